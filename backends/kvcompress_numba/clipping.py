"""Clipped ranges: `clip_groups` of `kvcompress.ops`; a vector holds the errors of all 16 ranges."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kvcompress.arrays import dtype_name
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.clipping import CUTS, errors
from kvcompress_numba.arrays import NDArray, Rows, divided, empty, fold, following, rows
from kvcompress_numba.groups import (
    Sizes,
    channel_starts,
    code_row,
    extremes,
    run_groups,
    store_range,
)
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import inline, kernel
from kvcompress_numba.vectors import (
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
    _, tokens, channels = shape = fold(x.shape)
    out, flat = empty(x.shape, "float32")
    range_shape = (*lead, *spec.range_shape(tokens, channels))
    range_dtype = spec.range_dtype or dtype_name(x.dtype)
    (_, low), (_, high) = empty(range_shape, range_dtype), empty(range_shape, range_dtype)
    args = rows(x), _table(spec.bits), low, high, flat
    run_groups(_clip_tokens, _clip_channels, spec, shape, (3 + LANES) * channels + 2, *args)
    return out


@cache
def _table(bits: int) -> NDArray:
    """Errors of the 16 ranges side by side, for each of 256 codes."""
    return np.ascontiguousarray(errors(bits).T).reshape(-1)


@inline
def _cut(sums: Any, at: int, low: Any, high: Any) -> Any:
    """Minimum and maximum of the range with the least of the 16 sums from `at` on."""
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
    sizes: Sizes,
    x: Rows,
    table: Any,
    minima: Any,
    maxima: Any,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    tokens, channels, _, size = sizes
    flat, head, token = x
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
            low, high = extremes(flat, first + at, n)
            place = unit * groups + group
            start, inverse = store_range(minima, maxima, place, low, high, _QMAX)
            starts[:n] = start
            inverses[:n] = inverse
            code_row(flat, first + at, n, _QMAX, starts, inverses, 0, row)
            errors = splat_int(0)
            for i in range(n):
                errors = errors + load_ints(table, np.int64(row[i]) * LANES)
            store_ints(sums, 0, errors)
            low, high = _cut(sums, 0, start, get(maxima, place))
            vectors = n & -LANES
            for i in range(0, vectors, LANES):
                value = maximum(load(flat, first + at + i), splat(low))
                store(out, unit * channels + at + i, minimum(value, splat(high)))
            for i in range(vectors, n):
                value = max(get(flat, first + at + i), low)
                out[unit * channels + at + i] = min(value, high)


@kernel
def _clip_channels(
    sizes: Sizes,
    x: Rows,
    table: Any,
    minima: Any,
    maxima: Any,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a group of tokens, all channels."""
    tokens, channels, _, size = sizes
    flat, head, token = x
    sums = scratch[: LANES * channels].view(np.int32)
    lows, highs, row = divided(scratch[LANES * channels :], channels)
    groups = (tokens + size - 1) // size
    vectors = channels & -LANES
    for unit in range(begin, end):
        h, at = unit // groups, unit % groups * size
        n = min(size, tokens - at)
        first = h * head + at * token
        place = unit * channels
        channel_starts(x, first, n, channels, minima, maxima, place, _QMAX, lows, highs)
        sums[:] = 0
        for t in range(n):
            code_row(flat, first + t * token, channels, _QMAX, lows, highs, 0, row)
            for i in range(channels):
                error = load_ints(table, np.int64(row[i]) * LANES)
                store_ints(sums, i * LANES, load_ints(sums, i * LANES) + error)
        # From here on: minimum and maximum of the ranges.
        for i in range(channels):
            high = get(maxima, unit * channels + i)
            lows[i], highs[i] = _cut(sums, i * LANES, lows[i], high)
        for t in range(n):
            here, to = first + t * token, (h * tokens + at + t) * channels
            for i in range(0, vectors, LANES):
                value = maximum(load(flat, here + i), load(lows, i))
                store(out, to + i, minimum(value, load(highs, i)))
            for i in range(vectors, channels):
                out[to + i] = min(max(get(flat, here + i), lows[i]), highs[i])
