"""Nearest centroids: `nearest`, `encode_product` and `decode_product` of `kvcompress.ops`.

A vector holds the scores of 16 centroids, which never reach memory. Sums are taken in another order
than by a matrix product, so where two centroids are equally near but for rounding, codes may differ
from those of the generic operations, as those do among libraries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcompress_numba.arrays import NDArray, Rows, empty, fold, following, rows
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import inline, kernel, run
from kvcompress_numba.vectors import (
    as_floats,
    get,
    load,
    load_ints,
    minimum,
    smallest,
    splat,
    splat_int,
    where_not_less,
)

_FAR = 2**24
"""More than any code; float32 holds it exactly."""


def nearest(x: NDArray, codebook: NDArray) -> NDArray:
    """See `kvcompress.ops.nearest`."""
    codes = np.empty(x.shape[0], np.int32)
    _encode(x[None], (codebook[None],), codes)
    return codes


def encode_product(x: NDArray, *codebooks: NDArray) -> NDArray:
    """See `kvcompress.ops.encode_product`."""
    codes = np.empty((*x.shape[:-1], len(codebooks)), np.uint8)
    _encode(x, codebooks, codes.reshape(-1))
    return codes


def decode_product(codes: NDArray, *codebooks: NDArray) -> NDArray:
    """See `kvcompress.ops.decode_product`."""
    table = np.concatenate(codebooks, axis=-1)
    out, flat = empty((*codes.shape[:-1], table.shape[-1]), "float32")
    heads, tokens, _ = fold(codes.shape)
    args = rows(codes), rows(table), tokens, table.shape[-1], _starts(codebooks), flat
    run(_decode_rows, heads * tokens, table.shape[-1], 0, *args)
    return out


def _encode(x: NDArray, codebooks: tuple[NDArray, ...], codes: NDArray) -> None:
    heads, tokens, channels = x.shape
    size = codebooks[0].shape[1]
    wide = -(-size // LANES) * LANES
    # Centroids that fill up the last vector are infinitely far.
    table = np.zeros((heads, channels, wide), np.float32)
    half_norms = np.full((heads, len(codebooks), wide), np.inf, np.float32)
    starts = _starts(codebooks)
    for i, codebook in enumerate(codebooks):
        table[:, starts[i] : starts[i + 1], :size] = codebook.transpose(0, 2, 1)
        half_norms[:, i, :size] = np.sum(codebook * codebook, axis=-1) / 2
    number = np.arange(wide, dtype=np.int32)
    tables = starts, wide, table.reshape(-1), half_norms.reshape(-1), number
    args = rows(x), tokens, channels, *tables, codes
    run(_encode_rows, heads * tokens, channels * wide, 0, *args)


def _starts(codebooks: tuple[NDArray, ...]) -> NDArray:
    """Where the channels of every codebook begin, and where the last end."""
    return np.cumsum([0, *(codebook.shape[-1] for codebook in codebooks)])


@inline
def _nearer(score: Any, here: Any, best: Any, code: Any) -> Any:
    """Lowest scores so far, and which they are of."""
    return minimum(best, score), where_not_less(score, best, code, here)


@inline
def _first(best: Any, code: Any) -> Any:
    """Of equals the first."""
    code = where_not_less(splat(smallest(best)), best, code, splat_int(_FAR))
    return np.int64(smallest(as_floats(code)))


@kernel
def _encode_rows(
    x: Rows,
    tokens: int,
    channels: int,
    starts: Any,
    wide: int,
    table: Any,
    half_norms: Any,
    number: Any,
    codes: Any,
    _: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row; four of a head at a time, for which entries are loaded once."""
    flat, head, token = x
    books = starts.size - 1
    unit = begin
    while unit < end:
        h, t = unit // tokens, unit % tokens
        last = min(4, end - unit, tokens - t) - 1
        # Where there are not four, the last is done more than once.
        u1, u2, u3 = unit + min(1, last), unit + min(2, last), unit + last
        x0 = h * head + t * token
        x1, x2, x3 = x0 + (u1 - unit) * token, x0 + (u2 - unit) * token, x0 + last * token
        for i in range(books):
            best0 = best1 = best2 = best3 = splat(np.float32(np.inf))
            code0 = code1 = code2 = code3 = splat_int(0)
            for j in range(0, wide, LANES):
                half_norm = load(half_norms, (h * books + i) * wide + j)
                score0 = score1 = score2 = score3 = half_norm
                for d in range(starts[i], starts[i + 1]):
                    entry = load(table, (h * channels + d) * wide + j)
                    score0 = score0 - splat(get(flat, x0 + d)) * entry
                    score1 = score1 - splat(get(flat, x1 + d)) * entry
                    score2 = score2 - splat(get(flat, x2 + d)) * entry
                    score3 = score3 - splat(get(flat, x3 + d)) * entry
                here = load_ints(number, j)
                best0, code0 = _nearer(score0, here, best0, code0)
                best1, code1 = _nearer(score1, here, best1, code1)
                best2, code2 = _nearer(score2, here, best2, code2)
                best3, code3 = _nearer(score3, here, best3, code3)
            codes[unit * books + i] = _first(best0, code0)
            codes[u1 * books + i] = _first(best1, code1)
            codes[u2 * books + i] = _first(best2, code2)
            codes[u3 * books + i] = _first(best3, code3)
        unit += last + 1


@kernel
def _decode_rows(
    codes: Rows,
    table: Rows,
    tokens: int,
    channels: int,
    starts: Any,
    out: Any,
    _: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    numbers, codes_head, codes_token = codes
    entries, table_head, table_token = table
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        for i in range(starts.size - 1):
            code = np.int64(numbers[h * codes_head + t * codes_token + i])
            entry = h * table_head + code * table_token
            for d in range(starts[i], starts[i + 1]):
                out[unit * channels + d] = entries[entry + d]
        h, t = following(h, t, tokens)
