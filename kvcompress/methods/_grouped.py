"""Groups coded between their minimum and maximum, which are themselves quantized below 8 bits.

Minima and maxima vary slowly along the tokens: 8 bits in groups of 32 are enough for them, and cost
little more than half of 16 bits. With 8 bits of code they are kept exact, or they would add as much
error as the codes.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvcompress.arrays import Array, array_namespace, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.methods.base import Payload, TensorSpec
from kvcompress.ops.affine import AffineSpec, dequantize, quantize


def encoded_spec(affine: AffineSpec, spec: TensorSpec) -> Mapping[str, TensorSpec]:
    """Arrays of the payload for a tensor ``[heads, tokens, channels]``."""
    heads, tokens, channels = spec.shape
    codes = TensorSpec((heads, *affine.codes_shape(tokens, channels)), "uint8")
    rows, columns = affine.range_shape(tokens, channels)
    columns *= 2
    if affine.bits == 8:
        return {"codes": codes, "ranges": TensorSpec((heads, rows, columns), spec.dtype)}
    outer = _outer(spec.dtype)
    outer_range = TensorSpec((heads, *outer.range_shape(rows, columns)), spec.dtype)
    return {
        "codes": codes,
        "ranges": TensorSpec((heads, *outer.codes_shape(rows, columns)), "uint8"),
        "ranges_min": outer_range,
        "ranges_max": outer_range,
    }


def encode(affine: AffineSpec, x: Array, dispatch: Dispatcher) -> Payload:
    """Quantize ``x [heads, tokens, channels]``; `affine` says in what dtype its ranges are."""
    codes, minimum, maximum = dispatch(quantize, x, spec=affine)
    ranges = array_namespace(x).concat([minimum, maximum], axis=-1)
    if affine.bits == 8:
        return {"codes": codes, "ranges": ranges}
    ranges, ranges_min, ranges_max = dispatch(
        quantize, ranges, spec=_outer(dtype_name(ranges.dtype))
    )
    return {"codes": codes, "ranges": ranges, "ranges_min": ranges_min, "ranges_max": ranges_max}


def decode(
    affine: AffineSpec,
    payload: Payload,
    spec: TensorSpec,
    dispatch: Dispatcher,
    *,
    dtype: str = "float32",
) -> Array:
    """Undo `encode`: of the shape of `spec`, narrowed to `dtype`."""
    _, tokens, channels = spec.shape
    _, columns = affine.range_shape(tokens, channels)
    ranges = payload["ranges"]
    if affine.bits != 8:
        outer = payload["ranges_min"], payload["ranges_max"]
        ranges = dispatch(dequantize, ranges, *outer, spec=_outer(spec.dtype), channels=2 * columns)
    codes, minimum, maximum = payload["codes"], ranges[..., :columns], ranges[..., columns:]
    return dispatch(
        dequantize, codes, minimum, maximum, spec=affine, channels=channels, dtype=dtype
    )


def _outer(dtype: str) -> AffineSpec:
    return AffineSpec(8, 32, "channel", dtype)
