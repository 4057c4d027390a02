"""What the compressor asks of keys and values before it computes anything."""

from __future__ import annotations

import numpy as np

from kvcompress.arrays import (
    FLOAT16_MAX,
    FLOATING,
    Array,
    array_namespace,
    device,
    dtype_name,
    is_concrete,
)
from kvcompress.backend import Dispatcher
from kvcompress.compressed.kv import KVLayout
from kvcompress.errors import DTypeError, NamespaceError, NonFiniteError, ShapeError
from kvcompress.methods.base import Role
from kvcompress.ops.bounds import within

LARGEST = 2.0**120
"""Largest magnitude accepted: what is computed from such still fits float32."""


def check_shapes(k: Array, v: Array, layout: KVLayout, ndim: int) -> None:
    """Raise `ShapeError` unless keys and values fit each other and the layout."""
    for name, x in (("k", k), ("v", v)):
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


def check_dtypes(k: Array, v: Array) -> str:
    """Return the name of the dtype that keys and values share; they share a device, too."""
    kinds = [dtype_name(x.dtype) for x in (k, v)]
    for name, kind in zip("kv", kinds, strict=True):
        if kind not in FLOATING:
            raise DTypeError(
                f"{name} must be {', '.join(FLOATING[:-1])} or {FLOATING[-1]}, got {kind}; "
                "cast it knowingly first"
            )
    if kinds[0] != kinds[1]:
        raise DTypeError(f"k and v must have one dtype, got {kinds[0]} and {kinds[1]}")
    if device(k) != device(v):
        raise NamespaceError(f"k and v must be on one device, got {device(k)} and {device(v)}")
    return kinds[0]


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
