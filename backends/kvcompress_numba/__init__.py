"""Kernels for NumPy arrays on the CPU, compiled by Numba at their first call and cached on disk.

Importing this package does not import Numba.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import numpy as np

from kvcompress.arrays import FLOATING, dtype_name
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.rotated import RotatedSpec

NDArray = np.ndarray[Any, Any]


class NumbaBackend:
    """Takes native, aligned NumPy arrays of float32, float16 and bfloat16."""

    name = "numba"

    def available(self) -> bool:
        """Tell whether Numba is installed; what is wrong with it otherwise, its import raises."""
        if find_spec("numba") is None:
            return False
        # The kernels too, so that whatever keeps them from loading shows here.
        importlib.import_module("kvcompress_numba.affine")
        from kvcompress_numba.threads import has_half_floats

        return has_half_floats()

    def supports(self, op: str, *arrays: Any, **static: Any) -> bool:
        """See `kvcompress.backend.Backend`."""
        if not all(map(_usable, arrays)):
            return False
        first, *others = (dtype_name(a.dtype) for a in arrays)
        if op in ("nearest", "encode_product"):
            return {first, *others} == {"float32"}
        if op == "decode_product":
            return first == "uint8" and set(others) == {"float32"}
        if op.endswith("allocated"):
            return [first, *others] == ["float32" if op.startswith("q") else "uint8", "uint8"]
        if op in ("dequantize", "dequantize_rotated"):
            if first != "uint8" or not all(name in FLOATING for name in others):
                return False
        elif first not in FLOATING or arrays[0].ndim < 2:
            return False
        if op == "cast":
            return bool(first != static["dtype"])
        if op in ("quantize_rotated", "dequantize_rotated"):
            channels = static.get("channels", arrays[0].shape[-1])
            return bool(channels & (channels - 1) == 0)
        return True

    def within(self, x: NDArray, *, limit: float) -> Any:
        """See `kvcompress.ops.within`."""
        from kvcompress_numba.bounds import within

        return within(x, limit=limit)

    def cast(self, x: NDArray, *, dtype: str) -> NDArray:
        """See `kvcompress.ops.cast`."""
        from kvcompress_numba.casting import cast

        return cast(x, dtype=dtype)

    def quantize(self, x: NDArray, *, spec: AffineSpec) -> tuple[NDArray, NDArray, NDArray]:
        """See `kvcompress.ops.quantize`."""
        from kvcompress_numba.affine import quantize

        return quantize(x, spec=spec)

    def dequantize(
        self, codes: NDArray, minimum: NDArray, maximum: NDArray, **static: Any
    ) -> NDArray:
        """See `kvcompress.ops.dequantize`."""
        from kvcompress_numba.affine import dequantize

        return dequantize(codes, minimum, maximum, **static)

    def clip_groups(self, x: NDArray, *, spec: AffineSpec) -> NDArray:
        """See `kvcompress.ops.clip_groups`."""
        from kvcompress_numba.clipping import clip_groups

        return clip_groups(x, spec=spec)

    def quantize_rotated(self, x: NDArray, *, spec: RotatedSpec) -> tuple[NDArray, NDArray]:
        """See `kvcompress.ops.quantize_rotated`."""
        from kvcompress_numba.rotated import quantize_rotated

        return quantize_rotated(x, spec=spec)

    def dequantize_rotated(self, codes: NDArray, gain: NDArray, **static: Any) -> NDArray:
        """See `kvcompress.ops.dequantize_rotated`."""
        from kvcompress_numba.rotated import dequantize_rotated

        return dequantize_rotated(codes, gain, **static)

    def quantize_allocated(self, x: NDArray, component_bits: NDArray, *, bits: int) -> NDArray:
        """See `kvcompress.ops.quantize_allocated`."""
        from kvcompress_numba.allocated import quantize_allocated

        return quantize_allocated(x, component_bits, bits=bits)

    def dequantize_allocated(
        self, packed: NDArray, component_bits: NDArray, *, bits: int
    ) -> NDArray:
        """See `kvcompress.ops.dequantize_allocated`."""
        from kvcompress_numba.allocated import dequantize_allocated

        return dequantize_allocated(packed, component_bits, bits=bits)

    def nearest(self, x: NDArray, codebook: NDArray) -> NDArray:
        """See `kvcompress.ops.nearest`."""
        from kvcompress_numba.codebooks import nearest

        return nearest(x, codebook)

    def encode_product(self, x: NDArray, *codebooks: NDArray) -> NDArray:
        """See `kvcompress.ops.encode_product`."""
        from kvcompress_numba.codebooks import encode_product

        return encode_product(x, *codebooks)

    def decode_product(self, codes: NDArray, *codebooks: NDArray) -> NDArray:
        """See `kvcompress.ops.decode_product`."""
        from kvcompress_numba.codebooks import decode_product

        return decode_product(codes, *codebooks)


def _usable(x: Any) -> bool:
    return type(x) is np.ndarray and x.dtype.isnative and x.flags.aligned


backend = NumbaBackend()
