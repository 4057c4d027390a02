"""One tensor: batch folded into the heads, exact tokens set aside, the rest by a method; and back.

A tensor is ``[..., tokens, head_dim]``; a method sees ``[heads, tokens, head_dim]``.
"""

from __future__ import annotations

import math

from kvcompress.arrays import Array, array_namespace, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.compressed.kv import CompressedTensor
from kvcompress.compressor.positions import Places, check_positions, locate, with_rope, without_rope
from kvcompress.compressor.validation import LARGEST, check_payload
from kvcompress.errors import PayloadError
from kvcompress.methods.base import Method, Role, TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.slots import Paged


def split_spec(shape: tuple[int, ...], dtype: str, *, exact: int) -> tuple[TensorSpec, TensorSpec]:
    """Specs of the tokens to encode, and of those to keep exact, which are at most `exact`."""
    heads, tokens, head_dim = _fold(shape)
    exact = min(tokens, exact)
    return (
        TensorSpec((heads, tokens - exact, head_dim), dtype),
        TensorSpec((heads, exact, head_dim), dtype),
    )


def readable(x: Array | Paged, method: Method, dispatch: Dispatcher) -> Array | Paged:
    """Return `x`, gathered unless the method and a backend can do with it in its pool."""
    in_place = (
        isinstance(x, Paged)
        and method.by_operations
        and dispatch.backend_for("within_paged", x.pool, x.slots, limit=LARGEST)
    )
    return x if in_place else dispatch.array(x)


def encode(
    x: Array | Paged,
    role: Role,
    method: Method,
    dispatch: Dispatcher,
    *,
    sinks: int,
    window: int,
    places: Places = 0,
) -> CompressedTensor:
    """Compress a tensor but for its first `sinks` and last `window` tokens, or all it has.

    Its tokens stand at `places`; keys go to the method without its RoPE.
    """
    xp = array_namespace(x)
    coded, exact = split_spec(x.shape, dtype_name(x.dtype), exact=sinks + window)
    if x.ndim != 3:
        x = xp.reshape(x, _fold(x.shape))
    kept, start, tokens = None, min(sinks, x.shape[1]), x.shape[1]
    if sinks or window:
        end = x.shape[1] - (exact.shape[1] - start)
        kept = xp.concat([dispatch.array(x[:, :start, :]), dispatch.array(x[:, end:, :])], axis=1)
        x = x[:, start:end, :]
    positions, rope = None, method.rope if role == "keys" else None
    if rope is not None:
        where = slice(start, start + coded.shape[1])
        positions = locate(places, x, coded=where, tokens=tokens, rope=rope)
        x = without_rope(x, rope, positions, dispatch)
    payload = method.encode(x, role, dispatch)
    payload = {name: payload[name] for name in sorted(payload)}  # as a pytree orders it
    ndim = next(iter(payload.values())).ndim
    return CompressedTensor(payload, kept, method.detach(), role, coded, ndim, positions)


def decode(
    tensor: CompressedTensor,
    known: Method | None,
    dispatch: Dispatcher,
    *,
    shape: tuple[int, ...],
    sinks: int,
) -> Array:
    """Restore a tensor of `shape`, of whose exact tokens `sinks` stand at the start.

    What `Method.detach` left out is taken from `known`.

    Raises
    ------
    CalibrationError, NamespaceError, PayloadError
        If `known` lacks what is needed, or the tensor does not hold what it claims to hold.
    """
    method = tensor.method.attach(known)
    check_payload(tensor.payload, method.encoded_spec(tensor.spec, tensor.role))
    exact = _checked_exact(tensor, shape, sinks)
    rope = method.rope if tensor.role == "keys" else None
    check_positions(tensor.positions, tensor.spec.shape[1], rope)
    x = method.decode(tensor.payload, tensor.spec, tensor.role, dispatch)
    if rope is not None and tensor.positions is not None:
        x = with_rope(x, rope, tensor.positions, dispatch)
    x = dispatch(cast, x, dtype=tensor.spec.dtype)
    xp = array_namespace(x)
    if exact is not None:
        x = xp.concat([exact[:, :sinks, :], x, exact[:, sinks:, :]], axis=1)
    return xp.reshape(x, shape)


def _checked_exact(tensor: CompressedTensor, shape: tuple[int, ...], sinks: int) -> Array | None:
    """Exact tokens, which with those coded must make up the shape."""
    (heads, tokens, head_dim), spec = _fold(shape), tensor.spec
    count = tokens - spec.shape[1]
    if spec.shape != (heads, tokens - count, head_dim) or not 0 <= sinks <= max(count, 0):
        raise PayloadError(
            f"coded tokens {spec.shape} and {sinks} sinks do not make up a tensor {shape}"
        )
    if tensor.exact is None:
        if count:
            raise PayloadError(f"{count} exact tokens are missing")
        return None
    check_payload(
        {"exact": tensor.exact}, {"exact": TensorSpec((heads, count, head_dim), spec.dtype)}
    )
    return tensor.exact


def _fold(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``[..., tokens, head_dim]`` as ``[heads, tokens, head_dim]``: batch folded into the heads."""
    *lead, tokens, head_dim = shape
    return math.prod(lead), tokens, head_dim
