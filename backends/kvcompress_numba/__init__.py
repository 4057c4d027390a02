"""Kernels for NumPy arrays on the CPU, compiled by Numba at their first call and cached on disk.

Importing this package does not import Numba.
"""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from kvcompress.arrays import FLOATING, dtype_name
from kvcompress.backend import KernelBackend, takes
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.clipping import LONGEST
from kvcompress.ops.rotated import RotatedSpec

NDArray = np.ndarray[Any, Any]


def _source(x: NDArray, **_: Any) -> bool:
    """What kernels read rows of."""
    return x.ndim >= 2 and dtype_name(x.dtype) in FLOATING


def _coded(codes: NDArray, *others: NDArray, **_: Any) -> bool:
    """Codes in bytes, and what else is needed to decode them."""
    return codes.dtype == np.uint8 and all(dtype_name(x.dtype) in FLOATING for x in others)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _takes_clip_groups(x: NDArray, *, spec: AffineSpec) -> bool:
    length = x.shape[-2 if spec.axis == "channel" else -1] if _source(x) else 0
    return _source(x) and min(spec.group_size, length) <= LONGEST


def _are(dtypes: str, *arrays: NDArray) -> bool:
    """Whether the arrays are of these dtypes, the last of which stands for all that follow."""
    names = dtypes.split()
    wanted = names + names[-1:] * (len(arrays) - len(names))
    return [x.dtype.name for x in arrays] == wanted


class NumbaBackend(KernelBackend):
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

    def usable(self, *arrays: Any) -> bool:
        """Tell whether the arrays are NumPy's own, and lie in memory as kernels read them."""
        return all(type(x) is np.ndarray and x.dtype.isnative and x.flags.aligned for x in arrays)

    @takes(_source)
    def within(self, x: NDArray, *, limit: float) -> Any:
        """See `kvcompress.ops.within`."""
        from kvcompress_numba.bounds import within

        return within(x, limit=limit)

    @takes(lambda x, *, dtype: _source(x) and dtype_name(x.dtype) != dtype)
    def cast(self, x: NDArray, *, dtype: str) -> NDArray:
        """See `kvcompress.ops.cast`."""
        from kvcompress_numba.casting import cast

        return cast(x, dtype=dtype)

    @takes(_source)
    def quantize(self, x: NDArray, *, spec: AffineSpec) -> tuple[NDArray, NDArray, NDArray]:
        """See `kvcompress.ops.quantize`."""
        from kvcompress_numba.affine import quantize

        return quantize(x, spec=spec)

    @takes(_coded)
    def dequantize(
        self, codes: NDArray, minimum: NDArray, maximum: NDArray, **static: Any
    ) -> NDArray:
        """See `kvcompress.ops.dequantize`."""
        from kvcompress_numba.affine import dequantize

        return dequantize(codes, minimum, maximum, **static)

    @takes(_takes_clip_groups)
    def clip_groups(self, x: NDArray, *, spec: AffineSpec) -> NDArray:
        """See `kvcompress.ops.clip_groups`."""
        from kvcompress_numba.clipping import clip_groups

        return clip_groups(x, spec=spec)

    @takes(lambda x, **_: _source(x) and _power_of_two(x.shape[-1]))
    def quantize_rotated(self, x: NDArray, *, spec: RotatedSpec) -> tuple[NDArray, NDArray]:
        """See `kvcompress.ops.quantize_rotated`."""
        from kvcompress_numba.rotated import quantize_rotated

        return quantize_rotated(x, spec=spec)

    @takes(lambda *arrays, channels, **_: _coded(*arrays) and _power_of_two(channels))
    def dequantize_rotated(self, codes: NDArray, gain: NDArray, **static: Any) -> NDArray:
        """See `kvcompress.ops.dequantize_rotated`."""
        from kvcompress_numba.rotated import dequantize_rotated

        return dequantize_rotated(codes, gain, **static)

    @takes(lambda *arrays, **_: _are("float32 uint8", *arrays))
    def quantize_allocated(self, x: NDArray, component_bits: NDArray, *, bits: int) -> NDArray:
        """See `kvcompress.ops.quantize_allocated`."""
        from kvcompress_numba.allocated import quantize_allocated

        return quantize_allocated(x, component_bits, bits=bits)

    @takes(lambda *arrays, **_: _are("uint8 uint8", *arrays))
    def dequantize_allocated(
        self, packed: NDArray, component_bits: NDArray, *, bits: int
    ) -> NDArray:
        """See `kvcompress.ops.dequantize_allocated`."""
        from kvcompress_numba.allocated import dequantize_allocated

        return dequantize_allocated(packed, component_bits, bits=bits)

    @takes(partial(_are, "float32"))
    def nearest(self, x: NDArray, codebook: NDArray) -> NDArray:
        """See `kvcompress.ops.nearest`."""
        from kvcompress_numba.codebooks import nearest

        return nearest(x, codebook)

    @takes(partial(_are, "float32"))
    def encode_product(self, x: NDArray, *codebooks: NDArray) -> NDArray:
        """See `kvcompress.ops.encode_product`."""
        from kvcompress_numba.codebooks import encode_product

        return encode_product(x, *codebooks)

    @takes(partial(_are, "uint8 float32"))
    def decode_product(self, codes: NDArray, *codebooks: NDArray) -> NDArray:
        """See `kvcompress.ops.decode_product`."""
        from kvcompress_numba.codebooks import decode_product

        return decode_product(codes, *codebooks)


backend = NumbaBackend()
