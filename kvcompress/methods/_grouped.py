"""Groups between two ends, where below 8 bits the ends themselves are quantized.

Ends vary slowly along the tokens: 8 bits in groups of 32 are enough for them, and cost little more
than half of 16 bits. With 8 bits of code they are kept exact, or they would add as much error as
the codes.
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
    rows, columns = affine.ends_shape(tokens, channels)
    columns *= 2
    if affine.bits == 8:
        return {"codes": codes, "ends": TensorSpec((heads, rows, columns), spec.dtype)}
    outer = _outer(spec.dtype)
    outer_ends = TensorSpec((heads, *outer.ends_shape(rows, columns)), spec.dtype)
    return {
        "codes": codes,
        "ends": TensorSpec((heads, *outer.codes_shape(rows, columns)), "uint8"),
        "ends_lower": outer_ends,
        "ends_upper": outer_ends,
    }


def encode(affine: AffineSpec, x: Array, dispatch: Dispatcher) -> Payload:
    """Quantize ``x [heads, tokens, channels]``; `affine` says in what dtype ends are."""
    codes, lower, upper = dispatch(quantize, x, spec=affine)
    ends = array_namespace(x).concat([lower, upper], axis=-1)
    if affine.bits == 8:
        return {"codes": codes, "ends": ends}
    ends, ends_lower, ends_upper = dispatch(quantize, ends, spec=_outer(dtype_name(ends.dtype)))
    return {"codes": codes, "ends": ends, "ends_lower": ends_lower, "ends_upper": ends_upper}


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
    _, columns = affine.ends_shape(tokens, channels)
    ends = payload["ends"]
    if affine.bits != 8:
        outer = payload["ends_lower"], payload["ends_upper"]
        ends = dispatch(dequantize, ends, *outer, spec=_outer(spec.dtype), channels=2 * columns)
    codes, lower, upper = payload["codes"], ends[..., :columns], ends[..., columns:]
    return dispatch(dequantize, codes, lower, upper, spec=affine, channels=channels, dtype=dtype)


def _outer(dtype: str) -> AffineSpec:
    return AffineSpec(8, 32, "channel", dtype)
