"""Transform coding by a tensor's own principal components, which it then has to carry."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvcompress.arrays import (
    Array,
    array_namespace,
    astype,
    device,
    dtype_name,
    is_concrete,
    look_up,
    map_matrices,
)
from kvcompress.backend import Dispatcher
from kvcompress.errors import PayloadError
from kvcompress.methods._gain_shape import Errors, best_gain, inverse, norms
from kvcompress.methods._side_information import GAINS
from kvcompress.methods.base import Payload, TensorSpec
from kvcompress.ops.affine import AffineSpec, dequantize, quantize
from kvcompress.ops.allocated import (
    DEEPEST,
    allocate,
    dequantize_allocated,
    quantize_allocated,
    round_allocated,
)
from kvcompress.ops.casting import cast
from kvcompress.ops.packing import packed_size
from kvcompress.ops.pca import principal_components

WIDENINGS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""By how much the levels for normal numbers may be spread to reach what lies far out."""

SAMPLE = 1024
"""Tokens at least, evenly spaced, that this is judged by."""

GAIN_BITS = 9
"""What the gain of a token takes: a byte, and the range of 32 gains."""


def encoded_spec(bits: float, spec: TensorSpec) -> Mapping[str, TensorSpec]:
    """Arrays of the payload; see `Method.encoded_spec`."""
    heads, tokens, head_dim = spec.shape
    row = TensorSpec((heads, 1, head_dim), spec.dtype)
    return {
        "codes": TensorSpec((heads, tokens, packed_size(_bits(bits, head_dim), 1)), "uint8"),
        **GAINS.encoded_spec(TensorSpec((heads, tokens, 1), spec.dtype)),
        "component_bits": TensorSpec((heads, head_dim), "uint8", DEEPEST + 1),
        "step": row,
        "mean": row,
        "scale": TensorSpec((heads, 1, 1), "float32"),
        "basis": TensorSpec((heads, head_dim, head_dim), "uint8"),
        "basis_min": row,
        "basis_max": row,
    }


def encode(bits: float, x: Array, dispatch: Dispatcher) -> tuple[Payload, Errors]:
    """Payload of a tensor, and what tells its errors."""
    xp, dtype, total = array_namespace(x), dtype_name(x.dtype), _bits(bits, x.shape[-1])
    scaled, norm, peak = norms(dispatch(cast, x, dtype="float32"))
    unit = scaled * inverse(norm)
    payload = _encode(total, unit, dtype, dispatch)
    direction = _decode(total, payload, dispatch)
    gain = best_gain(*(xp.vecdot(x, direction)[..., None] for x in (unit, direction)))
    # As a root mean square: the norm of a token may exceed the largest float16.
    size = norm * gain * (peak / math.sqrt(x.shape[-1]))
    gains = GAINS.encode(cast(size, dtype=dtype), dispatch)

    def errors() -> Array:
        error = (unit - gain * direction) * norm
        return xp.vecdot(error, error)

    return {**payload, **gains}, errors


def decode(bits: float, payload: Payload, spec: TensorSpec, dispatch: Dispatcher) -> Array:
    """Tensor ``[heads, tokens, head_dim]``, float32."""
    gain = GAINS.decode(payload, TensorSpec((*spec.shape[:-1], 1), spec.dtype), dispatch)
    x = _decode(_bits(bits, spec.shape[-1]), payload, dispatch)
    x *= gain
    x *= math.sqrt(spec.shape[-1])
    return x


def _encode(total: int, x: Array, dtype: str, dispatch: Dispatcher) -> Payload:
    """Payload of directions ``[heads, tokens, head_dim]``, without gains."""
    xp, head_dim = array_namespace(x), x.shape[-1]
    principal, _ = principal_components(x, head_dim)
    spec = AffineSpec(8, head_dim, "channel", dtype)
    basis, minimum, maximum = dispatch(quantize, astype(principal.basis, "float32"), spec=spec)
    payload = {
        "basis": basis,
        "basis_min": minimum,
        "basis_max": maximum,
        "mean": astype(principal.mean, dtype),
        "scale": principal.scale,
    }
    x = x / principal.scale
    x -= astype(payload["mean"], "float32")
    # By the inverse of the basis as it will be decoded: its rounding then costs nothing.
    y = x @ xp.matrix_transpose(map_matrices(xp.linalg.inv, _basis(payload, dispatch)))
    deviation = xp.sqrt(xp.sum(y * y, axis=-2, keepdims=True) / max(x.shape[-2], 1))
    payload["component_bits"] = allocate((deviation * deviation)[:, 0, :], total)
    payload["step"] = cast(_best_step(y, deviation, payload["component_bits"]), dtype=dtype)
    y = y / _divisor(astype(payload["step"], "float32"))
    payload["codes"] = dispatch(quantize_allocated, y, payload["component_bits"], bits=total)
    return payload


def _best_step(y: Array, deviation: Array, component_bits: Array) -> Array:
    """What to take for a component's deviation: more, where a few tokens lie far out."""
    xp, errors = array_namespace(y), []
    y = y[:, :: max(1, y.shape[1] // SAMPLE), :]
    for widening in WIDENINGS:
        step = deviation * widening
        error = y - round_allocated(y / _divisor(step), component_bits) * step
        errors.append(xp.sum(error * error, axis=-2, keepdims=True))
    best = xp.argmin(xp.stack(errors), axis=0)
    table = xp.asarray(WIDENINGS, dtype=xp.float32, device=device(y))
    return deviation * look_up(table, best)


def _divisor(step: Array) -> Array:
    return array_namespace(step).where(step > 0, step, 1.0)


def _decode(total: int, payload: Payload, dispatch: Dispatcher) -> Array:
    xp, component_bits = array_namespace(payload["codes"]), payload["component_bits"]
    sums = xp.sum(xp.astype(component_bits, xp.int32), axis=-1)
    if is_concrete(sums) and bool(xp.any(sums != total)):
        raise PayloadError(f"component_bits must add up to {total} for every head")
    levels = dispatch(dequantize_allocated, payload["codes"], component_bits, bits=total)
    levels *= astype(payload["step"], "float32")
    x = levels @ xp.matrix_transpose(_basis(payload, dispatch))
    x += astype(payload["mean"], "float32")
    x *= payload["scale"]
    return x


def _basis(payload: Payload, dispatch: Dispatcher) -> Array:
    codes, head_dim = payload["basis"], payload["basis"].shape[-1]
    spec = AffineSpec(8, head_dim, "channel", dtype_name(payload["basis_min"].dtype))
    ranges = payload["basis_min"], payload["basis_max"]
    return dispatch(dequantize, codes, *ranges, spec=spec, channels=head_dim)


def _bits(bits: float, head_dim: int) -> int:
    """Bits of the code of a token."""
    return min(max(1, round(bits * head_dim) - GAIN_BITS), DEEPEST * head_dim)
