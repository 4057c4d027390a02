"""Rotated quantization: `quantize_rotated` and `dequantize_rotated`, one pass over the data.

The Hadamard transform takes the same sums and differences as the generic form; that one also moves
its numbers about, but they come back to where they were.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kvcompress.ops.affine import TINY
from kvcompress.ops.hadamard import signs
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells, levels
from kvcompress.ops.rotated import RotatedSpec
from kvcompress_numba.arrays import NDArray, divided, empty, fold, following, rows
from kvcompress_numba.packing import pack_row, unpack_row
from kvcompress_numba.threads import inline, kernel, run
from kvcompress_numba.vectors import (
    LANES,
    absolute,
    butterflies,
    floored,
    get,
    largest,
    load,
    load_codes,
    maximum,
    minimum,
    narrow,
    permuted,
    rounded,
    splat,
    splat_int,
    store,
    store_codes,
    total,
    where_not_less,
)

_TINY, _ZERO, _ONE, _TWO = (np.float32(n) for n in (TINY, 0, 1, 2))
_CELLS, _MIDDLE = np.float32(CELLS_PER_UNIT), np.float32(LARGEST * CELLS_PER_UNIT)
_LAST_CELL = np.float32(2 * LARGEST * CELLS_PER_UNIT - 1)
FEW = 4
"""Bits of codes for which a vector holds a value for each."""

_LIMIT = np.float32(2.0**126)


def quantize_rotated(x: NDArray, *, spec: RotatedSpec) -> tuple[NDArray, NDArray]:
    """See `kvcompress.ops.quantize_rotated`; the channels must be a power of two."""
    *lead, _, _ = x.shape
    heads, tokens, channels = fold(x.shape)
    codes, flat = empty((*lead, *spec.codes_shape(tokens, channels)), "uint8")
    gain, gains = empty((*lead, tokens, 1), "float32")
    tables = signs(channels, spec.seed), cells(spec.bits), *_tables(spec.bits)
    args = *rows(x), tokens, channels, spec.bits, *tables, flat, gains
    run(_quantize, heads * tokens, channels, (3 + channels) * LANES + 3 * channels + 2, *args)
    return codes, gain


def dequantize_rotated(
    codes: NDArray, gain: NDArray, *, spec: RotatedSpec, channels: int, dtype: str = "float32"
) -> NDArray:
    """See `kvcompress.ops.dequantize_rotated`; the channels must be a power of two."""
    *lead, tokens, _ = codes.shape
    out, flat = empty((*lead, tokens, channels), dtype)
    tables = signs(channels, spec.seed), _tables(spec.bits)[1]
    args = *rows(codes), *rows(gain), tokens, channels, spec.bits, *tables, flat
    run(_dequantize, math.prod(lead) * tokens, channels, 3 * channels + 2, *args)
    return out


@cache
def _tables(bits: int) -> tuple[NDArray, NDArray]:
    """For few bits, the cell where every code begins, counted from zero; and the levels.

    Both have at least 16 entries.
    """
    count = 2**bits
    bounds, filled = np.full(LANES, np.inf, "float32"), np.zeros(max(LANES, count), "float32")
    if count <= LANES:
        bounds[:count] = np.searchsorted(cells(bits), np.arange(count)) - LARGEST * CELLS_PER_UNIT
    filled[:count] = levels(bits)
    return bounds, filled


@inline
def _rounds(y: Any, n: int, scale: Any) -> None:
    vectors = n & -LANES
    step = LANES if vectors else 1
    while step < n:
        for start in range(0, n, 2 * step):
            for i in range(start, start + step, LANES if vectors else 1):
                if vectors:
                    a, b = load(y, i), load(y, i + step)
                    store(y, i, a + b)
                    store(y, i + step, a - b)
                else:
                    c, d = y[i], y[i + step]
                    y[i], y[i + step] = c + d, c - d
        step *= 2
    for i in range(0, vectors, LANES):
        store(y, i, load(y, i) * splat(scale))
    for i in range(vectors, n):
        y[i] *= scale


@inline
def _transform(y: Any, n: int, scale: Any) -> None:
    """Hadamard transform of ``y[:n]``, of which `butterflies` have been taken if n >= 16."""
    if n == 128:
        _rounds(y, 128, scale)
    elif n == 64:
        _rounds(y, 64, scale)
    else:
        _rounds(y, n, scale)


@inline
def _dot(x: Any, y: Any, n: int, unit: Any) -> Any:
    """Inner product of products rounded to multiples of ``1 / unit``, exactly added."""
    vectors, whole = n & -LANES, np.int32(0)
    if vectors:
        sums = rounded(load(x, 0) * load(y, 0) * splat(unit))
        for i in range(LANES, vectors, LANES):
            sums = sums + rounded(load(x, i) * load(y, i) * splat(unit))
        whole = total(sums)
    for i in range(vectors, n):
        whole += np.int32(np.rint(x[i] * y[i] * unit))
    return np.float32(whole) / unit


@inline
def _sqrt(x: Any) -> Any:
    """16 square roots, like those of the generic form."""
    root = (x + splat(_ONE)) / splat(_TWO)
    for _ in range(14):
        root = (root + x / root) / splat(_TWO)
    return root


@inline
def _halve(code: Any, step: int, place: Any, bounds: Any) -> Any:
    higher = code | splat_int(step)
    return where_not_less(place, permuted(bounds, higher), higher, code)


@inline
def _search(place: Any, bounds: Any) -> Any:
    """Codes of 16 cells, by bisection: the last of the 16 ascending `bounds` they reach."""
    code = _halve(splat_int(0), 8, place, bounds)
    code = _halve(code, 4, place, bounds)
    code = _halve(code, 2, place, bounds)
    return _halve(code, 1, place, bounds)


@inline
def _encode_few(y: Any, n: int, inverse: Any, bounds: Any, levels: Any, one: Any, row: Any) -> Any:
    """Codes of up to 4 bits for ``y[:n] * inverse``; return the factor that serves them best."""
    products, squares = splat_int(0), splat_int(0)
    for i in range(0, n, LANES):
        value = load(y, i) * splat(inverse)
        code = _search(floored(value * splat(_CELLS)), bounds)
        store_codes(row, i, code)
        level = permuted(levels, code)
        products = products + rounded(value * level * splat(one))
        squares = squares + rounded(level * level * splat(one))
    return np.float32(total(products)) / np.float32(total(squares))


@inline
def _encode(
    y: Any, n: int, inverse: Any, cells: Any, levels: Any, one: Any, level: Any, row: Any
) -> Any:
    """The same for any codes, by table."""
    for i in range(n):
        y[i] *= inverse
        place = np.floor(y[i] * _CELLS) + _MIDDLE
        row[i] = cells[np.uint32(min(max(place, _ZERO), _LAST_CELL))]
        level[i] = levels[row[i]]
    return _dot(y, level, n, one) / _dot(level, level, n, one)


@kernel
def _quantize(
    x: Any,
    head: int,
    token: int,
    tokens: int,
    channels: int,
    bits: int,
    sign: Any,
    cells: Any,
    bounds: Any,
    levels: Any,
    codes: Any,
    gains: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row; a block of 16 at a time, so that no step waits for the one before."""
    peaks, powers = scratch[:LANES], scratch[LANES : 2 * LANES]
    inverses = scratch[2 * LANES : 3 * LANES]
    block = scratch[3 * LANES : (3 + channels) * LANES]
    level, _, row = divided(scratch[(3 + channels) * LANES :], channels)
    scale = np.float32(1 / math.sqrt(channels))
    log = 0
    while (channels - 1) >> log:
        log += 1
    one = np.float32(1 << (22 - log))
    width = codes.size // gains.size
    vectors = channels & -LANES
    first_bounds, first_levels = load(bounds, 0), load(levels, 0)
    powers[:] = _ONE
    h, t = begin // tokens, begin % tokens
    for start in range(begin, end, LANES):
        count = min(LANES, end - start)
        for r in range(count):
            first = h * head + t * token
            h, t = following(h, t, tokens)
            peak = _ZERO
            if vectors:
                most = absolute(load(x, first))
                for i in range(LANES, vectors, LANES):
                    most = maximum(most, absolute(load(x, first + i)))
                peak = largest(most)
            for i in range(vectors, channels):
                peak = max(peak, abs(get(x, first + i)))
            inverse = _ZERO if peak < _TINY else _ONE / peak
            y = block[r * channels : (r + 1) * channels]
            for i in range(0, vectors, LANES):
                store(y, i, butterflies(load(x, first + i) * splat(inverse) * load(sign, i)))
            for i in range(vectors, channels):
                y[i] = get(x, first + i) * inverse * sign[i]
            _transform(y, channels, scale)
            peaks[r], powers[r] = peak, _dot(y, y, channels, one) / np.float32(channels)
        rms = _sqrt(load(powers, 0))
        store(powers, 0, rms)
        store(inverses, 0, splat(_ONE) / rms)
        for r in range(count):
            y = block[r * channels : (r + 1) * channels]
            if vectors and bits <= FEW:
                share = _encode_few(y, channels, inverses[r], first_bounds, first_levels, one, row)
            else:
                share = _encode(y, channels, inverses[r], cells, levels, one, level, row)
            unit = start + r
            gains[unit] = _ZERO if peaks[r] < _TINY else peaks[r] * powers[r] * share
            pack_row(row, channels, bits, codes, unit * width)


@kernel
def _dequantize(
    codes: Any,
    codes_head: int,
    codes_token: int,
    gain: Any,
    gain_head: int,
    gain_token: int,
    tokens: int,
    channels: int,
    bits: int,
    sign: Any,
    levels: Any,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    y, _, row = divided(scratch, channels)
    scale = np.float32(1 / math.sqrt(channels))
    vectors = channels & -LANES
    first_levels = load(levels, 0)
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        unpack_row(codes, h * codes_head + t * codes_token, channels, bits, row)
        gain_ = get(gain, h * gain_head + t * gain_token)
        h, t = following(h, t, tokens)
        if vectors and bits <= FEW:
            for i in range(0, vectors, LANES):
                store(y, i, butterflies(permuted(first_levels, load_codes(row, i))))
        else:
            for i in range(channels):
                y[i] = levels[row[i]]
            for i in range(0, vectors, LANES):
                store(y, i, butterflies(load(y, i)))
        _transform(y, channels, scale)
        first = unit * channels
        for i in range(0, vectors, LANES):
            value = load(y, i) * load(sign, i) * splat(gain_)
            narrow(out, first + i, minimum(maximum(value, splat(-_LIMIT)), splat(_LIMIT)))
        for i in range(vectors, channels):
            value = y[i] * sign[i] * gain_
            narrow(out, first + i, min(max(value, -_LIMIT), _LIMIT))
