"""Groups along tokens or channels: kernels called for them, ranges, and codes within these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from kvcompress.ops.affine import TINY, AffineSpec
from kvcompress_numba.arrays import Rows
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import inline, run
from kvcompress_numba.vectors import (
    as_bits,
    get,
    largest,
    load,
    maximum,
    minimum,
    smallest,
    splat,
    store,
    store_codes,
)

_TINY, _ZERO = np.float32(TINY), np.float32(0)
_WHOLE = np.float32(1.5 * 2**23)
"""Added to a number from 0 to 255, rounds it to a whole one, half to even, in the low byte."""


Sizes: TypeAlias = tuple[int, int, int, int]
"""Tokens of a head, channels, bits, tokens or channels of a group: what kernels must know."""


def run_groups(
    by_token: Callable[..., None],
    by_channel: Callable[..., None],
    spec: AffineSpec,
    shape: tuple[int, int, int],
    scratch: int,
    *args: Any,
) -> None:
    """Call the kernel of an axis: its units are rows, or all channels of a group of tokens.

    Before `args` it gets `Sizes`.
    """
    heads, tokens, channels = shape
    size = spec.group_size
    sizes: Sizes = (tokens, channels, spec.bits, size)
    if spec.axis == "token":
        run(by_token, heads * tokens, channels, scratch, sizes, *args)
    else:
        groups = heads * -(-tokens // size)
        run(by_channel, groups, min(tokens, size) * channels, scratch, sizes, *args)


@inline
def extremes(x: Any, first: int, n: int) -> Any:
    """Smallest and largest of ``x[first : first + n]``."""
    vectors = n & -LANES
    low = high = get(x, first)
    if vectors:
        lows = highs = load(x, first)
        for i in range(first + LANES, first + vectors, LANES):
            value = load(x, i)
            lows, highs = minimum(lows, value), maximum(highs, value)
        low, high = smallest(lows), largest(highs)
    for i in range(first + vectors, first + n):
        low, high = min(low, get(x, i)), max(high, get(x, i))
    return low, high


@inline
def _channel_ends(x: Rows, first: int, n: int, channels: int, lows: Any, highs: Any) -> None:
    """Smallest and largest of every channel of `n` tokens."""
    flat, _, token = x
    vectors = channels & -LANES
    for i in range(channels):
        lows[i] = highs[i] = get(flat, first + i)
    for t in range(1, n):
        here = first + t * token
        for i in range(0, vectors, LANES):
            value = load(flat, here + i)
            store(lows, i, minimum(load(lows, i), value))
            store(highs, i, maximum(load(highs, i), value))
        for i in range(vectors, channels):
            lows[i] = min(lows[i], get(flat, here + i))
            highs[i] = max(highs[i], get(flat, here + i))


@inline
def store_range(minima: Any, maxima: Any, at: int, low: Any, high: Any, qmax: Any) -> Any:
    """Store the range of a group; return its minimum, and codes per unit of the source."""
    store(minima, at, _ZERO if abs(low) < _TINY else low)
    store(maxima, at, _ZERO if abs(high) < _TINY else high)
    start = get(minima, at)
    extent = get(maxima, at) - start
    return start, _ZERO if extent < _TINY else qmax / extent


@inline
def channel_starts(
    x: Rows,
    first: int,
    n: int,
    channels: int,
    minima: Any,
    maxima: Any,
    at: int,
    qmax: Any,
    starts: Any,
    inverses: Any,
) -> None:
    """`store_range` of every channel of `n` tokens: where it starts, codes per unit."""
    _channel_ends(x, first, n, channels, starts, inverses)
    for i in range(channels):
        starts[i], inverses[i] = store_range(minima, maxima, at + i, starts[i], inverses[i], qmax)


@inline
def log_of(size: int) -> int:
    """Binary logarithm of a group size, if vectors lie within groups; otherwise 0."""
    log = 0
    if size >= LANES and size & (size - 1) == 0:
        while size >> log > 1:
            log += 1
    return log


@inline
def numbers_of(numbers: Any, i: int, log: int) -> Any:
    """Numbers of 16 channels from `i` on; each stands for ``2**log``, 1 or at least 16."""
    return splat(numbers[i >> log]) if log else load(numbers, i)


@inline
def codes_of(x: Any, first: int, starts: Any, inverses: Any, log: int, i: int, qmax: Any) -> Any:
    """Codes of 16 channels from `i` on; above the low byte there is more."""
    start, inverse = numbers_of(starts, i, log), numbers_of(inverses, i, log)
    scaled = (load(x, first + i) - start) * inverse
    return as_bits(minimum(maximum(scaled, splat(_ZERO)), splat(qmax)) + splat(_WHOLE))


@inline
def code_row(
    x: Any, first: int, n: int, qmax: Any, starts: Any, inverses: Any, log: int, row: Any
) -> None:
    """Codes of ``x[first : first + n]``, a byte each."""
    vectors = n & -LANES
    for i in range(0, vectors, LANES):
        store_codes(row, i, codes_of(x, first, starts, inverses, log, i, qmax))
    for i in range(vectors, n):
        scaled = (get(x, first + i) - starts[i >> log]) * inverses[i >> log]
        row[i] = np.int64((min(max(scaled, _ZERO), qmax) + _WHOLE) - _WHOLE)
