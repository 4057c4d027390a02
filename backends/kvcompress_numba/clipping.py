"""Clipped ranges: `clip_groups` of `kvcompress.ops`; a vector holds the errors of all 16 ranges."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kvcompress._namespace import dtype_name
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.clipping import CUTS, errors
from kvcompress_numba.affine import channel_ends, code_row, ends, store_ends
from kvcompress_numba.arrays import NDArray, divided, empty, fold, following, rows
from kvcompress_numba.threads import inline, kernel, run
from kvcompress_numba.vectors import (
    LANES,
    get,
    load,
    load_ints,
    maximum,
    minimum,
    splat,
    splat_int,
    store,
    store_ints,
)

_QMAX, _SIXTEEN, _CUTS = np.float32(255), np.float32(16), len(CUTS)


def clip_groups(x: NDArray, *, spec: AffineSpec) -> NDArray:
    """See `kvcompress.ops.clip_groups`."""
    *lead, _, _ = x.shape
    heads, tokens, channels = fold(x.shape)
    out, flat = empty(x.shape, "float32")
    shape = (*lead, *spec.ends_shape(tokens, channels))
    (_, low), (_, high) = (empty(shape, spec.ends_dtype or dtype_name(x.dtype)) for _ in range(2))
    table = _table(spec.bits)
    args = *rows(x), tokens, channels, spec.group_size, table, low, high, flat
    scratch = (3 + LANES) * channels + 2
    if spec.axis == "token":
        run(_clip_tokens, heads * tokens, channels, scratch, *args)
    else:
        groups = heads * -(-tokens // spec.group_size)
        run(_clip_channels, groups, min(tokens, spec.group_size) * channels, scratch, *args)
    return out


@cache
def _table(bits: int) -> NDArray:
    """Errors of the 16 ranges side by side, for each of 256 codes."""
    return np.ascontiguousarray(errors(bits).T).reshape(-1)


@inline
def _cut(sums: Any, at: int, low: Any, high: Any) -> Any:
    """Ends of the range with the least of the 16 sums from `at` on."""
    best = 0
    for i in range(1, LANES):
        if sums[at + i] < sums[at + best]:
            best = i
    sixteenth = (high - low) / _SIXTEEN
    for _ in range(best // _CUTS):
        low += sixteenth
    for _ in range(best % _CUTS):
        high -= sixteenth
    return low, high


@kernel
def _clip_tokens(
    x: Any,
    head: int,
    token: int,
    tokens: int,
    channels: int,
    size: int,
    table: Any,
    lower: Any,
    upper: Any,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    sums = scratch[: LANES * channels].view(np.int32)
    starts, inverses, row = divided(scratch[LANES * channels :], channels)
    groups = (channels + size - 1) // size
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        first = h * head + t * token
        h, t = following(h, t, tokens)
        for group in range(groups):
            at = group * size
            n = min(size, channels - at)
            low, high = ends(x, first + at, n)
            place = unit * groups + group
            start, inverse = store_ends(lower, upper, place, low, high, _QMAX)
            starts[:n] = start
            inverses[:n] = inverse
            code_row(x, first + at, n, _QMAX, starts, inverses, 0, row)
            errors = splat_int(0)
            for i in range(n):
                errors = errors + load_ints(table, np.int64(row[i]) * LANES)
            store_ints(sums, 0, errors)
            low, high = _cut(sums, 0, start, get(upper, place))
            vectors = n & -LANES
            for i in range(0, vectors, LANES):
                value = maximum(load(x, first + at + i), splat(low))
                store(out, unit * channels + at + i, minimum(value, splat(high)))
            for i in range(vectors, n):
                value = max(get(x, first + at + i), low)
                out[unit * channels + at + i] = min(value, high)


@kernel
def _clip_channels(
    x: Any,
    head: int,
    token: int,
    tokens: int,
    channels: int,
    size: int,
    table: Any,
    lower: Any,
    upper: Any,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a group of tokens, all channels."""
    sums = scratch[: LANES * channels].view(np.int32)
    lows, highs, row = divided(scratch[LANES * channels :], channels)
    groups = (tokens + size - 1) // size
    vectors = channels & -LANES
    for unit in range(begin, end):
        h, at = unit // groups, unit % groups * size
        n = min(size, tokens - at)
        first = h * head + at * token
        channel_ends(x, first, token, n, channels, lows, highs)
        for i in range(channels):
            place = unit * channels + i
            lows[i], highs[i] = store_ends(lower, upper, place, lows[i], highs[i], _QMAX)
        sums[:] = 0
        for t in range(n):
            code_row(x, first + t * token, channels, _QMAX, lows, highs, 0, row)
            for i in range(channels):
                error = load_ints(table, np.int64(row[i]) * LANES)
                store_ints(sums, i * LANES, load_ints(sums, i * LANES) + error)
        # From here on: the ends of the ranges.
        for i in range(channels):
            high = get(upper, unit * channels + i)
            lows[i], highs[i] = _cut(sums, i * LANES, lows[i], high)
        for t in range(n):
            here, to = first + t * token, (h * tokens + at + t) * channels
            for i in range(0, vectors, LANES):
                value = maximum(load(x, here + i), load(lows, i))
                store(out, to + i, minimum(value, load(highs, i)))
            for i in range(vectors, channels):
                out[to + i] = min(max(get(x, here + i), lows[i]), highs[i])
