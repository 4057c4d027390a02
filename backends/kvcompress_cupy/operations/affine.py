"""Affine quantization: `quantize` and `dequantize`."""

from __future__ import annotations

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import takes
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.packing import CODE_BITS
from kvcompress_cupy.launches import affine
from kvcompress_cupy.launches.layout import CHANNELS
from kvcompress_cupy.operations.base import Kernels, by_heads, in_place
from kvcompress_cupy.sources import CTYPES


def _takes_quantize(x: Array, *, spec: AffineSpec) -> bool:
    return _supported(x, x.shape[-2], spec)


def _takes_quantize_paged(pool: Array, slots: Array, *, spec: AffineSpec) -> bool:
    return in_place(pool, slots) and _supported(pool, slots.shape[0], spec)


def _takes_dequantize(
    codes: Array,
    minimum: Array,
    maximum: Array,
    *,
    spec: AffineSpec,
    channels: int,
    dtype: str = "float32",
) -> bool:
    return (
        dtype in CTYPES
        and dtype_name(minimum.dtype) in CTYPES
        and minimum.dtype == maximum.dtype
        and channels <= CHANNELS
        and _has_template(spec, codes.shape[-2], channels)
    )


class Affine(Kernels):
    """See `kvcompress.ops.affine`."""

    @takes(_takes_quantize)
    def quantize(self, x: Array, *, spec: AffineSpec) -> tuple[Array, Array, Array]:
        """See `kvcompress.ops.quantize`."""
        return self._quantize(x, None, spec)

    @takes(_takes_quantize_paged)
    def quantize_paged(
        self, pool: Array, slots: Array, *, spec: AffineSpec
    ) -> tuple[Array, Array, Array]:
        """Quantize what `kvcompress.ops.gather_slots` would gather."""
        return self._quantize(by_heads(pool), slots, spec)

    def _quantize(
        self, x: Array, slots: Array | None, spec: AffineSpec
    ) -> tuple[Array, Array, Array]:
        *lead, tokens, channels = x.shape
        if slots is not None:
            tokens = slots.shape[0]
        dtype = dtype_name(x.dtype)
        range_dtype = spec.range_dtype or dtype
        ranges = (*lead, *spec.range_shape(tokens, channels))
        codes = self._runtime.empty((*lead, *spec.codes_shape(tokens, channels)), "uint8", x)
        minimum, maximum = (self._runtime.empty(ranges, range_dtype, x) for _ in range(2))
        if codes.size:
            x, rows = self._rows(x, slots)
            token = spec.axis == "token"
            launch = (affine.quantize_token if token else affine.quantize_channel)(
                rows,
                spec=spec,
                dtype=dtype,
                range_dtype=range_dtype,
                aligned=rows.aligned(self._runtime.pointer(x), x.dtype.itemsize),
            )
            self._runtime.launch(launch, x, slots, codes, minimum, maximum)
        return codes, minimum, maximum

    @takes(_takes_dequantize)
    def dequantize(
        self,
        codes: Array,
        minimum: Array,
        maximum: Array,
        *,
        spec: AffineSpec,
        channels: int,
        dtype: str = "float32",
    ) -> Array:
        """See `kvcompress.ops.dequantize`; in `dtype`, what exceeds float16 being its largest."""
        out = self._runtime.empty((*codes.shape[:-1], channels), dtype, codes)
        if out.size:
            codes, rows = self._rows(codes)
            minimum, ranges = self._rows(minimum)
            maximum, maximum_rows = self._rows(maximum)
            if ranges != maximum_rows:
                minimum, ranges = self._rows(self._runtime.contiguous(minimum))
                maximum, _ = self._rows(self._runtime.contiguous(maximum))
            launch = affine.dequantize(
                rows,
                ranges,
                spec=spec,
                channels=channels,
                dtype=dtype,
                range_dtype=dtype_name(minimum.dtype),
                aligned=rows.aligned(self._runtime.pointer(codes), 1, 4),
            )
            self._runtime.launch(launch, codes, minimum, maximum, out)
        return out


def _supported(x: Array, tokens: int, spec: AffineSpec) -> bool:
    dtypes, channels = {dtype_name(x.dtype), spec.range_dtype or dtype_name(x.dtype)}, x.shape[-1]
    limit = affine.COLUMNS if spec.axis == "channel" else CHANNELS
    return (
        dtypes <= set(CTYPES)
        and channels <= limit
        and tokens < 2**31
        and _has_template(spec, tokens, channels)
    )


def _has_template(spec: AffineSpec, tokens: int, channels: int) -> bool:
    length = channels if spec.axis == "token" else tokens
    return spec.bits in CODE_BITS and affine.has_template(spec.group_size, length)
