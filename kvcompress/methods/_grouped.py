"""Groups coded between their minimum and maximum, which are themselves quantized below 8 bits.

With 8 bits of code they are kept exact, or they would add as much error as the codes.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvcompress.arrays import Array, array_namespace
from kvcompress.backend import Dispatcher
from kvcompress.methods._side_information import RANGES
from kvcompress.methods.base import Payload, TensorSpec
from kvcompress.ops.affine import AffineSpec, dequantize, quantize


def encoded_spec(affine: AffineSpec, spec: TensorSpec) -> Mapping[str, TensorSpec]:
    """Arrays of the payload for a tensor ``[heads, tokens, channels]``."""
    heads, tokens, channels = spec.shape
    codes = TensorSpec((heads, *affine.codes_shape(tokens, channels)), "uint8")
    ranges = _ranges(affine, spec)
    if affine.bits == 8:
        return {"codes": codes, "ranges": ranges}
    return {"codes": codes, **RANGES.encoded_spec(ranges)}


def encode(affine: AffineSpec, x: Array, dispatch: Dispatcher) -> Payload:
    """Quantize ``x [heads, tokens, channels]``; `affine` says in what dtype its ranges are."""
    codes, minimum, maximum = dispatch(quantize, x, spec=affine)
    ranges = array_namespace(x).concat([minimum, maximum], axis=-1)
    if affine.bits == 8:
        return {"codes": codes, "ranges": ranges}
    return {"codes": codes, **RANGES.encode(ranges, dispatch)}


def decode(
    affine: AffineSpec,
    payload: Payload,
    spec: TensorSpec,
    dispatch: Dispatcher,
    *,
    dtype: str = "float32",
) -> Array:
    """Undo `encode`: of the shape of `spec`, narrowed to `dtype`."""
    ranges, stored = payload["ranges"], _ranges(affine, spec)
    if affine.bits != 8:
        ranges = RANGES.decode(payload, stored, dispatch)
    columns = stored.shape[-1] // 2
    parts = payload["codes"], ranges[..., :columns], ranges[..., columns:]
    static = {"spec": affine, "channels": spec.shape[-1], "dtype": dtype}
    return dispatch(dequantize, *parts, **static)


def _ranges(affine: AffineSpec, spec: TensorSpec) -> TensorSpec:
    """Minima and maxima of the groups, side by side."""
    heads, tokens, channels = spec.shape
    rows, columns = affine.range_shape(tokens, channels)
    return TensorSpec((heads, rows, 2 * columns), spec.dtype)
