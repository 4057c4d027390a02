"""Setting a fixed number of rows aside, so that they can be kept exact."""

from __future__ import annotations

from kvcompress.arrays import Array, array_namespace, device, largest_positions, scatter


def largest(score: Array, count: int) -> Array:
    """Positions of the `count` largest scores of every head, ascending.

    Parameters
    ----------
    score : array ``[heads, rows]``
    count : int
        0 to `rows`.

    Returns
    -------
    array ``[heads, count]``, int32
    """
    xp = array_namespace(score)
    heads, _ = score.shape
    if count == 0 or heads == 0:
        return xp.zeros((heads, count), dtype=xp.int32, device=device(score))
    return xp.sort(xp.astype(largest_positions(score, count), xp.int32), axis=-1)


def gather_rows(x: Array, index: Array) -> Array:
    """Rows ``x[h, index[h]]``.

    Parameters
    ----------
    x : array ``[heads, rows, ...]``
    index : array ``[heads, count]``, int32

    Returns
    -------
    array ``[heads, count, ...]``
    """
    xp = array_namespace(x, index)
    heads, rows, *rest = x.shape
    taken = xp.take(xp.reshape(x, (heads * rows, *rest)), _flat(index, rows), axis=0)
    return xp.reshape(taken, (*index.shape, *rest))


def put_rows(x: Array, index: Array, values: Array, *, overwrite: bool = False) -> Array:
    """Return `x` with ``x[h, index[h]] = values[h]``; the reverse of `gather_rows`.

    With `overwrite`, `x` itself is written where its library can, and must not be used afterwards.
    """
    xp = array_namespace(x, index, values)
    heads, rows, *rest = x.shape
    flat = xp.reshape(x, (heads * rows, *rest))
    values = xp.reshape(values, (heads * index.shape[1], *rest))
    flat = scatter(flat, _flat(index, rows), values, overwrite=overwrite)
    return xp.reshape(flat, x.shape)


def _flat(index: Array, rows: int) -> Array:
    """Indices into the heads laid end to end."""
    xp = array_namespace(index)
    # The default integer: int64 where the library has it, for more than 2**31 rows in all.
    offset = xp.arange(index.shape[0], device=device(index))[:, None] * rows
    return xp.reshape(xp.astype(index, offset.dtype) + offset, (index.shape[0] * index.shape[1],))
