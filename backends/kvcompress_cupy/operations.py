"""The operations as kernel launches, whatever runs them: CuPy or, in tests, an emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kvcompress._namespace import Array, dtype_name
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.rotated import RotatedSpec
from kvcompress_cupy import geometry
from kvcompress_cupy.geometry import Launch, Rows
from kvcompress_cupy.sources import BITS, CTYPES, DIMS, WORDS


class Runtime(Protocol):
    """Where arrays live and kernels run."""

    def pointer(self, x: Array) -> int:
        """Address of the first element of `x`."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Array:
        """Allocate an array on the device of `like`."""

    def contiguous(self, x: Array) -> Array:
        """Return `x` or a copy in C order."""

    def launch(self, launch: Launch, *arrays: Array, reached: Sequence[Array] = ()) -> None:
        """Run a kernel on the current stream; it reaches some arrays through its scalars."""


class Operations:
    """Kernels behind the signatures of `kvcompress.ops`.

    Parameters
    ----------
    runtime : Runtime
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def supports(self, op: str, *arrays: Array, **static: Any) -> bool:
        """Tell whether there is an instantiation for the call."""
        return bool(getattr(self, f"_supports_{op}")(*arrays, **static))

    def _supports_quantize(self, x: Array, *, spec: AffineSpec) -> bool:
        dtypes = {dtype_name(x.dtype), spec.ends_dtype or dtype_name(x.dtype)}
        limit = geometry.COLUMNS if spec.axis == "channel" else geometry.CHANNELS
        tokens, channels = x.shape[-2:]
        return dtypes <= set(CTYPES) and channels <= limit and _has_template(spec, tokens, channels)

    def quantize(self, x: Array, *, spec: AffineSpec) -> tuple[Array, Array, Array]:
        """See `kvcompress.ops.quantize`."""
        *lead, tokens, channels = x.shape
        dtype = dtype_name(x.dtype)
        ends_dtype = spec.ends_dtype or dtype
        ends = (*lead, *spec.ends_shape(tokens, channels))
        codes = self._runtime.empty((*lead, *spec.codes_shape(tokens, channels)), "uint8", x)
        lower, upper = (self._runtime.empty(ends, ends_dtype, x) for _ in range(2))
        if x.size:
            x, rows = self._rows(x)
            token = spec.axis == "token"
            launch = (geometry.quantize_token if token else geometry.quantize_channel)(
                rows,
                spec=spec,
                dtype=dtype,
                ends_dtype=ends_dtype,
                aligned=rows.aligned(self._runtime.pointer(x), x.dtype.itemsize),
            )
            self._runtime.launch(launch, x, codes, lower, upper)
        return codes, lower, upper

    def _supports_dequantize(
        self,
        codes: Array,
        lower: Array,
        upper: Array,
        *,
        spec: AffineSpec,
        channels: int,
        dtype: str = "float32",
    ) -> bool:
        return (
            dtype in CTYPES
            and dtype_name(lower.dtype) in CTYPES
            and lower.dtype == upper.dtype
            and channels <= geometry.CHANNELS
            and _has_template(spec, codes.shape[-2], channels)
        )

    def dequantize(
        self,
        codes: Array,
        lower: Array,
        upper: Array,
        *,
        spec: AffineSpec,
        channels: int,
        dtype: str = "float32",
    ) -> Array:
        """See `kvcompress.ops.dequantize`; in `dtype`, what exceeds float16 being its largest."""
        out = self._runtime.empty((*codes.shape[:-1], channels), dtype, codes)
        if out.size:
            codes, rows = self._rows(codes)
            lower, ends = self._rows(lower)
            upper, upper_ends = self._rows(upper)
            if ends != upper_ends:
                lower, ends = self._rows(self._runtime.contiguous(lower))
                upper, _ = self._rows(self._runtime.contiguous(upper))
            launch = geometry.dequantize(
                rows,
                ends,
                spec=spec,
                channels=channels,
                dtype=dtype,
                ends_dtype=dtype_name(lower.dtype),
                aligned=rows.aligned(self._runtime.pointer(codes), 1, 4),
            )
            self._runtime.launch(launch, codes, lower, upper, out)
        return out

    def _supports_quantize_rotated(self, x: Array, *, spec: RotatedSpec) -> bool:
        return spec.bits in BITS and x.shape[-1] in DIMS and dtype_name(x.dtype) in CTYPES

    def quantize_rotated(self, x: Array, *, spec: RotatedSpec) -> tuple[Array, Array]:
        """See `kvcompress.ops.quantize_rotated`."""
        *lead, tokens, channels = x.shape
        codes = self._runtime.empty((*lead, *spec.codes_shape(tokens, channels)), "uint8", x)
        gain = self._runtime.empty((*lead, tokens, 1), "float32", x)
        if x.size:
            x, rows = self._rows(x)
            launch = geometry.quantize_rotated(
                rows,
                spec=spec,
                dtype=dtype_name(x.dtype),
                aligned=rows.aligned(self._runtime.pointer(x), x.dtype.itemsize),
            )
            self._runtime.launch(launch, x, codes, gain)
        return codes, gain

    def _supports_dequantize_rotated(
        self,
        codes: Array,
        gain: Array,
        *,
        spec: RotatedSpec,
        channels: int,
        dtype: str = "float32",
    ) -> bool:
        dtypes = {dtype, dtype_name(gain.dtype)}
        return spec.bits in BITS and channels in DIMS and dtypes <= set(CTYPES)

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
            launch = geometry.dequantize_rotated(
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

    def _supports_nearest(self, x: Array, codebook: Array) -> bool:
        return _all_float32(x, codebook) and x.shape[1] > 0 and 0 < codebook.shape[0] < 2**31

    def nearest(self, x: Array, codebook: Array) -> Array:
        """See `kvcompress.ops.nearest`; near ties may fall otherwise."""
        codes = self._runtime.empty((x.shape[0],), "int32", x)
        if codes.size:
            x, rows = self._rows(x)
            codebook = self._contiguous(codebook)
            launch = geometry.nearest(rows, size=codebook.shape[0])
            self._runtime.launch(launch, x, codebook, codes)
        return codes

    def _supports_lookup(self, codes: Array, codebook: Array) -> bool:
        width = codebook.shape[1] * codebook.dtype.itemsize
        return (
            codes.dtype.kind in "iu"
            and codebook.dtype.itemsize >= 2
            and 0 < codebook.shape[0] < 2**31
            and 0 < width <= geometry.CHANNELS
        )

    def lookup(self, codes: Array, codebook: Array) -> Array:
        """See `kvcompress.ops.lookup`."""
        size, dim = codebook.shape
        out = self._runtime.empty((codes.shape[0], dim), dtype_name(codebook.dtype), codes)
        if out.size:
            codes, codebook = self._contiguous(codes), self._contiguous(codebook)
            row_bytes = dim * codebook.dtype.itemsize
            address = self._runtime.pointer(codebook)
            launch = geometry.lookup(
                codes.shape[0],
                row_bytes=row_bytes,
                word=next(word for word in WORDS if row_bytes % word == address % word == 0),
                size=size,
                code_bytes=codes.dtype.itemsize,
            )
            self._runtime.launch(launch, codes, codebook, out)
        return out

    def _supports_encode_product(self, x: Array, *codebooks: Array) -> bool:
        return (
            _all_float32(x, *codebooks)
            and 0 < len(codebooks) <= geometry.BOOKS
            and x.shape[-1] <= geometry.CHANNELS
        )

    def encode_product(self, x: Array, *codebooks: Array) -> Array:
        """See `kvcompress.ops.encode_product`; near ties may fall otherwise."""
        heads, tokens, _ = x.shape
        codes = self._runtime.empty((heads, tokens, len(codebooks)), "uint8", x)
        if codes.size:
            x, rows = self._rows(x)
            kept, books = self._books(codebooks)
            classes = np.array([geometry.product_class(dim) for dim in books["dim"]])
            for dim in np.unique(classes):
                launch = geometry.encode_product(
                    rows, books=books[classes == dim], columns=len(codebooks)
                )
                self._runtime.launch(launch, x, codes, reached=kept)
        return codes

    def _supports_decode_product(self, codes: Array, *codebooks: Array) -> bool:
        return (
            codes.dtype.name == "uint8"
            and _all_float32(*codebooks)
            and 0 < len(codebooks) <= geometry.BOOKS
            and sum(codebook.shape[-1] for codebook in codebooks) <= geometry.CHANNELS
        )

    def decode_product(self, codes: Array, *codebooks: Array) -> Array:
        """See `kvcompress.ops.decode_product`."""
        heads, tokens, _ = codes.shape
        channels = sum(codebook.shape[-1] for codebook in codebooks)
        out = self._runtime.empty((heads, tokens, channels), "float32", codes)
        if out.size:
            codes, rows = self._rows(codes)
            kept, books = self._books(codebooks)
            launch = geometry.decode_product(rows, books=books, channels=channels)
            self._runtime.launch(launch, codes, out, reached=kept)
        return out

    def _books(self, codebooks: Sequence[Array]) -> tuple[Sequence[Array], np.ndarray[Any, Any]]:
        """Codebooks, copied where they have gaps, and what kernels have to know of them."""
        kept = [self._contiguous(codebook) for codebook in codebooks]
        books = np.zeros(len(kept), geometry.CODEBOOK)
        books["centroids"] = [self._runtime.pointer(codebook) for codebook in kept]
        books["column"] = range(len(kept))
        books["dim"] = [codebook.shape[-1] for codebook in kept]
        books["start"] = np.cumsum(books["dim"]) - books["dim"]
        return kept, books

    def _contiguous(self, x: Array) -> Array:
        return x if x.flags.c_contiguous else self._runtime.contiguous(x)

    def _rows(self, x: Array) -> tuple[Array, Rows]:
        """Rows of `x`, or of a copy where its strides are of no use."""
        rows = geometry.rows(x.shape, x.strides, x.dtype.itemsize)
        if rows is not None:
            return x, rows
        return self._runtime.contiguous(x), geometry.contiguous_rows(x.shape)


def _has_template(spec: AffineSpec, tokens: int, channels: int) -> bool:
    length = channels if spec.axis == "token" else tokens
    return spec.bits in BITS and geometry.has_template(spec.group_size, length)


def _all_float32(*arrays: Array) -> bool:
    return all(array.dtype.name == "float32" for array in arrays)
