"""Tokens of several heads side by side: what a transform codes together."""

from __future__ import annotations

from kvcompress.arrays import Array, array_namespace


def join_heads(x: Array, heads: int) -> Array:
    """``[rows * heads, tokens, dim]`` to ``[rows, tokens, heads * dim]``."""
    if heads == 1:
        return x
    rows, tokens, dim = x.shape[0] // heads, x.shape[1], x.shape[2]
    xp = array_namespace(x)
    x = xp.permute_dims(xp.reshape(x, (rows, heads, tokens, dim)), (0, 2, 1, 3))
    return xp.reshape(x, (rows, tokens, heads * dim))


def split_heads(x: Array, heads: int) -> Array:
    """Undo `join_heads`."""
    if heads == 1:
        return x
    rows, tokens, dim = x.shape[0], x.shape[1], x.shape[2] // heads
    xp = array_namespace(x)
    x = xp.permute_dims(xp.reshape(x, (rows, tokens, heads, dim)), (0, 2, 1, 3))
    return xp.reshape(x, (rows * heads, tokens, dim))


def join_batch(x: Array, units: int) -> Array:
    """``[batch * units, tokens, n]`` to ``[units, batch * tokens, n]``."""
    batch, tokens, n = x.shape[0] // units, x.shape[1], x.shape[2]
    xp = array_namespace(x)
    x = xp.permute_dims(xp.reshape(x, (batch, units, tokens, n)), (1, 0, 2, 3))
    return xp.reshape(x, (units, batch * tokens, n))


def split_batch(x: Array, batch: int, tokens: int) -> Array:
    """Undo `join_batch`."""
    units, _, n = x.shape
    xp = array_namespace(x)
    x = xp.permute_dims(xp.reshape(x, (units, batch, tokens, n)), (1, 0, 2, 3))
    return xp.reshape(x, (batch * units, tokens, n))
