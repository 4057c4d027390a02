"""Codes of different widths: `quantize_allocated` and `dequantize_allocated`."""

from __future__ import annotations

from kvcompress.arrays import Array
from kvcompress.backend import takes
from kvcompress.ops.packing import packed_size
from kvcompress_cupy.launches import allocated
from kvcompress_cupy.operations.base import Kernels


def _takes_quantize_allocated(x: Array, component_bits: Array, *, bits: int) -> bool:
    return x.dtype.name == "float32" and _supported(component_bits, bits)


def _takes_dequantize_allocated(packed: Array, component_bits: Array, *, bits: int) -> bool:
    return packed.dtype.name == "uint8" and _supported(component_bits, bits)


class Allocated(Kernels):
    """See `kvcompress.ops.allocated`."""

    @takes(_takes_quantize_allocated)
    def quantize_allocated(self, x: Array, component_bits: Array, *, bits: int) -> Array:
        """See `kvcompress.ops.quantize_allocated`."""
        heads, tokens, _ = x.shape
        codes = self._runtime.empty((heads, tokens, packed_size(bits, 1)), "uint8", x)
        if codes.size:
            x, rows = self._rows(x)
            launch = allocated.quantize_allocated(
                rows, bits=bits, aligned=rows.aligned(self._runtime.pointer(x), 4)
            )
            self._runtime.launch(launch, x, self._contiguous(component_bits), codes)
        return codes

    @takes(_takes_dequantize_allocated)
    def dequantize_allocated(self, packed: Array, component_bits: Array, *, bits: int) -> Array:
        """See `kvcompress.ops.dequantize_allocated`."""
        heads, tokens, _ = packed.shape
        out = self._runtime.empty((heads, tokens, component_bits.shape[-1]), "float32", packed)
        if out.size:
            packed, rows = self._rows(packed)
            launch = allocated.dequantize_allocated(
                rows, bits=bits, channels=component_bits.shape[-1]
            )
            self._runtime.launch(launch, packed, self._contiguous(component_bits), out)
        return out


def _supported(component_bits: Array, bits: int) -> bool:
    channels = component_bits.shape[-1]
    return component_bits.dtype.name == "uint8" and channels <= allocated.COMPONENTS and bits > 0
