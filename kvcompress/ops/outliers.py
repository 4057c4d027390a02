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
    if cuts := _cuts(index, rows):
        parts = [gather_rows(x[cut, ...], index[cut, :]) for cut in cuts]
        return xp.concat(parts, axis=0)
    taken = xp.take(xp.reshape(x, (heads * rows, *rest)), _flat(index, rows), axis=0)
    return xp.reshape(taken, (*index.shape, *rest))


def put_rows(x: Array, index: Array, values: Array, *, overwrite: bool = False) -> Array:
    """Return `x` with ``x[h, index[h]] = values[h]``; the reverse of `gather_rows`.

    With `overwrite`, `x` itself is written where its library can, and must not be used afterwards.
    """
    xp = array_namespace(x, index, values)
    heads, rows, *rest = x.shape
    if cuts := _cuts(index, rows):
        parts = [put_rows(x[cut, ...], index[cut, :], values[cut, ...]) for cut in cuts]
        return xp.concat(parts, axis=0)
    flat = xp.reshape(x, (heads * rows, *rest))
    values = xp.reshape(values, (heads * index.shape[1], *rest))
    flat = scatter(flat, _flat(index, rows), values, overwrite=overwrite)
    return xp.reshape(flat, x.shape)


def _cuts(index: Array, rows: int) -> list[slice]:
    """How heads must be cut to have their rows numbered; empty if they need not be."""
    heads, fit = index.shape[0], _heads_that_fit(index, rows)
    if fit >= heads:
        return []
    return [slice(h, min(h + fit, heads)) for h in range(0, heads, fit)]


def _heads_that_fit(index: Array, rows: int) -> int:
    """How many heads of `rows` rows the default integer of a library can number together.

    It is int64, but for JAX, which has int32 unless it was told otherwise.
    """
    xp = array_namespace(index)
    largest_integer = int(xp.iinfo(xp.arange(0, device=device(index)).dtype).max)
    return max(1, largest_integer // max(1, rows))


def _flat(index: Array, rows: int) -> Array:
    """Indices into the heads laid end to end."""
    xp = array_namespace(index)
    offset = xp.arange(index.shape[0], device=device(index))[:, None] * rows
    return xp.reshape(xp.astype(index, offset.dtype) + offset, (index.shape[0] * index.shape[1],))
