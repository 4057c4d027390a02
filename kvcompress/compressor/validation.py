"""What the compressor asks of keys and values before it computes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvcompress.arrays import (
    FLOAT16_MAX,
    FLOATING,
    Array,
    HostArray,
    array_namespace,
    check_array,
    device,
    dtype_name,
    is_concrete,
    to_host,
)
from kvcompress.backend import Dispatcher
from kvcompress.compressed.kv import KVLayout
from kvcompress.errors import (
    DTypeError,
    NamespaceError,
    NonFiniteError,
    PayloadError,
    SettingError,
    ShapeError,
)
from kvcompress.methods.base import Payload, Role, TensorSpec
from kvcompress.ops.bounds import within

LARGEST = 2.0**120
"""Largest magnitude accepted: what is computed from such still fits float32."""

FARTHEST = 2**30
"""Largest position accepted: those of the tokens that follow still fit int32."""


def check_pair(k: Array, v: Array, layout: KVLayout, ndim: int) -> None:
    """Check that keys and values fit each other and a layout of `ndim` dimensions.

    Raises
    ------
    NamespaceError, ShapeError, DTypeError
    """
    array_namespace(k, v)
    for name, x in (("k", k), ("v", v)):
        check_array(name, x)
        if x.ndim != ndim:
            hint = {3: "; see compress_kv_3d", 4: "; see compress_kv"}.get(x.ndim, "")
            raise ShapeError(
                f"{name} must have {ndim} dimensions {layout.value}, "
                f"got {x.ndim}: shape {tuple(x.shape)}{hint}"
            )
        if x.shape[-1] == 0:
            raise ShapeError(f"head_dim of {name} must be at least 1, got shape {tuple(x.shape)}")
    if tuple(k.shape[:-1]) != tuple(v.shape[:-1]):
        raise ShapeError(
            f"k and v must agree in all sizes but the last, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    kinds = [dtype_name(x.dtype) for x in (k, v)]
    for name, kind in zip("kv", kinds, strict=True):
        if kind not in FLOATING:
            raise DTypeError(
                f"{name} must be {', '.join(FLOATING[:-1])} or {FLOATING[-1]}, got {kind}; "
                "convert it to one of these first"
            )
    if kinds[0] != kinds[1]:
        raise DTypeError(f"k and v must have one dtype, got {kinds[0]} and {kinds[1]}")
    if device(k) != device(v):
        raise NamespaceError(f"k and v must be on one device, got {device(k)} and {device(v)}")


def check_cache(keys: Sequence[Array], values: Sequence[Array]) -> None:
    """Check that keys and values fit each other, layer by layer.

    Raises
    ------
    NamespaceError, ShapeError, DTypeError
    """
    if len(keys) != len(values):
        raise ShapeError(f"got keys of {len(keys)} layers and values of {len(values)}")
    for k, v in zip(keys, values, strict=True):
        check_pair(k, v, KVLayout.BATCHED, 4)


def check_alike(arrays: Sequence[Array]) -> None:
    """Check that the arrays of a layer group are of one library, dtype and device.

    Raises
    ------
    NamespaceError, DTypeError
    """
    array_namespace(*arrays)
    dtype, where = dtype_name(arrays[0].dtype), device(arrays[0])
    for x in arrays:
        if dtype_name(x.dtype) != dtype:
            raise DTypeError(
                f"all layers must have one dtype, got {dtype} and {dtype_name(x.dtype)}"
            )
        if device(x) != where:
            raise NamespaceError(f"all layers must be on one device, got {where} and {device(x)}")


def positions_of(counts: Sequence[int], positions: Array | None) -> list[HostArray]:
    """Positions of the tokens of every layer, on the host.

    Without `positions`, the layer with most tokens holds all of them from the first on, and others,
    of a sliding window, the last ones.

    Raises
    ------
    NamespaceError, DTypeError, ShapeError
        If `positions` are not integers, or not one for every token.
    SettingError
        If they are out of range.
    """
    if positions is None:
        most = max(counts, default=0)
        return [np.arange(most - count, most) for count in counts]
    for count in counts:
        check_token_positions(positions, (count,))
    return [to_host(positions)] * len(counts)


def check_token_positions(positions: Array, *shapes: tuple[int, ...]) -> None:
    """Check that an array holds positions, and has one of some shapes.

    Raises
    ------
    NamespaceError, DTypeError, ShapeError
    SettingError
        If they are not from 0 to `FARTHEST`, as far as they can be looked at.
    """
    xp = array_namespace(positions)
    if not xp.isdtype(positions.dtype, "integral"):
        raise DTypeError(f"positions must be integers, got {dtype_name(positions.dtype)}")
    shape = tuple(positions.shape)
    if shape not in shapes:
        accepted = " or ".join(str(list(shape)) for shape in shapes)
        raise ShapeError(f"positions must be of shape {accepted}, got {list(shape)}")
    if is_concrete(positions) and 0 not in shape:
        low, high = int(xp.min(positions)), int(xp.max(positions))
        if low < 0 or high > FARTHEST:
            raise SettingError(f"positions must be from 0 to {FARTHEST}, got {low} to {high}")


def check_finite(x: Array, role: Role, dispatch: Dispatcher, nonfinite: str) -> Array:
    """Return `x`, saturated if so asked; else raise `NonFiniteError` as far as one can look."""
    limit = FLOAT16_MAX if dtype_name(x.dtype) == "float16" else LARGEST
    if nonfinite == "saturate":
        xp, x = array_namespace(x), dispatch.array(x)
        # No clip: NumPy has none for bfloat16.
        x = xp.where(xp.isnan(x), xp.zeros_like(x), x)
        x = xp.where(x > limit, xp.full_like(x, limit), x)
        return xp.where(x < -limit, xp.full_like(x, -limit), x)
    if is_concrete(x) and not bool(dispatch(within, x, limit=limit)):
        raise NonFiniteError(_first(dispatch.array(x), limit, role))
    return x


def _first(x: Array, limit: float, role: Role) -> str:
    """Say where the first bad value is."""
    xp = array_namespace(x)
    bad = ~(xp.abs(x) <= limit)
    flat = int(xp.argmax(xp.astype(xp.reshape(bad, (-1,)), xp.uint8)))
    where = tuple(int(i) for i in np.unravel_index(flat, x.shape))
    count = int(xp.sum(xp.astype(bad, xp.int32)))
    return (
        f"{role} hold {float(x[where])} at index {list(where)}, and {count - 1} more values that "
        f'are not finite or exceed {LARGEST:.3g}; nonfinite="saturate" accepts them'
    )


def check_payload(payload: Payload, expected: Mapping[str, TensorSpec]) -> None:
    """Check that a payload holds what its method expects, before a kernel sees it.

    Arrays must be of one library, of the shapes and dtypes expected; whole numbers must be in
    range, as far as they can be looked at.

    Raises
    ------
    NamespaceError, PayloadError
    """
    if payload.keys() != expected.keys():
        raise PayloadError(f"expected the arrays {sorted(expected)}, got {sorted(payload)}")
    array_namespace(*payload.values())
    for name, spec in expected.items():
        spec.check(name, payload[name])
