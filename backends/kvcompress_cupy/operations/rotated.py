"""Quantization of rotated rows: `quantize_rotated` and `dequantize_rotated`."""

from __future__ import annotations

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import takes
from kvcompress.ops.packing import CODE_BITS
from kvcompress.ops.rotated import RotatedSpec
from kvcompress_cupy.launches import rotated
from kvcompress_cupy.operations.base import Kernels, by_heads, in_place
from kvcompress_cupy.sources import CTYPES, DIMS


def _takes_quantize_rotated(x: Array, *, spec: RotatedSpec) -> bool:
    return spec.bits in CODE_BITS and x.shape[-1] in DIMS and dtype_name(x.dtype) in CTYPES


def _takes_quantize_rotated_paged(pool: Array, slots: Array, *, spec: RotatedSpec) -> bool:
    return in_place(pool, slots) and _takes_quantize_rotated(pool, spec=spec)


def _takes_dequantize_rotated(
    _: Array,
    gain: Array,
    *,
    spec: RotatedSpec,
    channels: int,
    dtype: str = "float32",
) -> bool:
    dtypes = {dtype, dtype_name(gain.dtype)}
    return spec.bits in CODE_BITS and channels in DIMS and dtypes <= set(CTYPES)


class Rotated(Kernels):
    """See `kvcompress.ops.rotated`."""

    @takes(_takes_quantize_rotated)
    def quantize_rotated(self, x: Array, *, spec: RotatedSpec) -> tuple[Array, Array]:
        """See `kvcompress.ops.quantize_rotated`."""
        return self._quantize_rotated(x, None, spec)

    @takes(_takes_quantize_rotated_paged)
    def quantize_rotated_paged(
        self, pool: Array, slots: Array, *, spec: RotatedSpec
    ) -> tuple[Array, Array]:
        """Quantize what `kvcompress.ops.gather_slots` would gather."""
        return self._quantize_rotated(by_heads(pool), slots, spec)

    def _quantize_rotated(
        self, x: Array, slots: Array | None, spec: RotatedSpec
    ) -> tuple[Array, Array]:
        *lead, tokens, channels = x.shape
        if slots is not None:
            tokens = slots.shape[0]
        codes = self._runtime.empty((*lead, *spec.codes_shape(tokens, channels)), "uint8", x)
        gain = self._runtime.empty((*lead, tokens, 1), "float32", x)
        if codes.size:
            x, rows = self._rows(x, slots)
            launch = rotated.quantize_rotated(
                rows,
                spec=spec,
                dtype=dtype_name(x.dtype),
                aligned=rows.aligned(self._runtime.pointer(x), x.dtype.itemsize),
            )
            self._runtime.launch(launch, x, slots, codes, gain)
        return codes, gain

    @takes(_takes_dequantize_rotated)
    def dequantize_rotated(
        self,
        codes: Array,
        gain: Array,
        *,
        spec: RotatedSpec,
        channels: int,
        dtype: str = "float32",
    ) -> Array:
        """See `kvcompress.ops.dequantize_rotated`; in `dtype`, as `dequantize`."""
        out = self._runtime.empty((*codes.shape[:-1], channels), dtype, codes)
        if out.size:
            codes, rows = self._rows(codes)
            gain, gains = self._rows(gain)
            launch = rotated.dequantize_rotated(
                rows,
                gains,
                spec=spec,
                channels=channels,
                gain_dtype=dtype_name(gain.dtype),
                dtype=dtype,
                aligned=rows.aligned(self._runtime.pointer(codes), 1, 4),
            )
            self._runtime.launch(launch, codes, gain, out)
        return out
