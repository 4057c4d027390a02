"""Rotated quantization: `quantize_rotated` and `dequantize_rotated`, one pass over the data."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kvcompress.ops.affine import TINY
from kvcompress.ops.hadamard import signs
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells, levels
from kvcompress.ops.rotated import FAINT, RotatedSpec
from kvcompress_numba.arrays import NDArray, Rows, divided, empty, fold, following, rows
from kvcompress_numba.hadamard import transform
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.packing import one_plane, pack_row, unpack_row
from kvcompress_numba.threads import inline, kernel, run
from kvcompress_numba.vectors import (
    absolute,
    butterflies,
    get,
    largest,
    load,
    load_codes,
    maximum,
    minimum,
    narrow,
    permuted,
    rounded,
    shift_left,
    splat,
    splat_int,
    store,
    store_codes,
    total,
    where_not_less,
    without_faint,
)

_TINY, _FAINT, _ZERO, _ONE, _TWO = (np.float32(n) for n in (TINY, FAINT, 0, 1, 2))
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
    args = rows(x), tokens, channels, spec.bits, *tables, flat, gains
    run(_quantize, heads * tokens, channels, (3 + channels) * LANES + 3 * channels + 2, *args)
    return codes, gain


def dequantize_rotated(
    codes: NDArray, gain: NDArray, *, spec: RotatedSpec, channels: int, dtype: str = "float32"
) -> NDArray:
    """See `kvcompress.ops.dequantize_rotated`; the channels must be a power of two."""
    *lead, tokens, _ = codes.shape
    out, flat = empty((*lead, tokens, channels), dtype)
    tables = signs(channels, spec.seed), _tables(spec.bits)[1]
    args = rows(codes), rows(gain), tokens, channels, spec.bits, *tables, flat
    run(_dequantize, math.prod(lead) * tokens, channels, 3 * channels + 2, *args)
    return out


@cache
def _tables(bits: int) -> tuple[NDArray, NDArray]:
    """For few bits, the number where every code begins; and the levels.

    Both have at least 16 entries.
    """
    count = 2**bits
    bounds, filled = np.full(LANES, np.inf, "float32"), np.zeros(max(LANES, count), "float32")
    if count <= LANES:
        first = np.searchsorted(cells(bits), np.arange(count))
        bounds[:count] = first / CELLS_PER_UNIT - LARGEST
    filled[:count] = levels(bits)
    return bounds, filled


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
def _halve(code: Any, step: int, value: Any, bounds: Any) -> Any:
    higher = code | splat_int(step)
    return where_not_less(value, permuted(bounds, higher), higher, code)


@inline
def _search(value: Any, bounds: Any) -> Any:
    """Codes of 16 numbers, by bisection: the last of the 16 ascending `bounds` they reach."""
    code = _halve(splat_int(0), 8, value, bounds)
    code = _halve(code, 4, value, bounds)
    code = _halve(code, 2, value, bounds)
    return _halve(code, 1, value, bounds)


@inline
def _encode_few(
    y: Any,
    n: int,
    bits: int,
    inverse: Any,
    bounds: Any,
    levels: Any,
    one: Any,
    row: Any,
    codes: Any,
    at: int,
) -> Any:
    """Pack codes of up to 4 bits for ``y[:n] * inverse``; return the factor that serves them best.

    `row` has ``n + 8`` places to spare.
    """
    products, squares = splat_int(0), splat_int(0)
    # By a power of two, which may as well come first.
    scaled = levels * splat(one)
    squared = rounded(levels * scaled)
    whole = one_plane(n, bits)
    size = n * bits >> 3 if whole else n
    for j in range(0, size, LANES):
        byte = splat_int(0)
        for i in range(n // size):
            value = load(y, i * size + j) * splat(inverse)
            code = _search(value, bounds)
            products = products + rounded(value * permuted(scaled, code))
            squares = squares + permuted(squared, code)
            byte = byte | shift_left(code, i * bits)
        if whole:
            store_codes(codes, at + j, byte)
        else:
            store_codes(row, j, byte)
    if not whole:
        pack_row(row, n, bits, codes, at)
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
    x: Rows,
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
    flat, head, token = x
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
                most = absolute(load(flat, first))
                for i in range(LANES, vectors, LANES):
                    most = maximum(most, absolute(load(flat, first + i)))
                peak = largest(most)
            for i in range(vectors, channels):
                peak = max(peak, abs(get(flat, first + i)))
            inverse = _ZERO if peak < _TINY else _ONE / peak
            y = block[r * channels : (r + 1) * channels]
            for i in range(0, vectors, LANES):
                value = load(flat, first + i) * splat(inverse)
                value = without_faint(value, splat(_FAINT)) * load(sign, i)
                store(y, i, butterflies(value))
            for i in range(vectors, channels):
                number = get(flat, first + i) * inverse
                y[i] = number * sign[i] if abs(number) >= _FAINT else _ZERO
            transform(y, channels, scale)
            peaks[r], powers[r] = peak, _dot(y, y, channels, one) / np.float32(channels)
        rms = _sqrt(load(powers, 0))
        store(powers, 0, rms)
        store(inverses, 0, splat(_ONE) / rms)
        for r in range(count):
            y = block[r * channels : (r + 1) * channels]
            unit = start + r
            at = unit * width
            if vectors and bits <= FEW:
                share = _encode_few(
                    y, channels, bits, inverses[r], first_bounds, first_levels, one, row, codes, at
                )
            else:
                share = _encode(y, channels, inverses[r], cells, levels, one, level, row)
                pack_row(row, channels, bits, codes, at)
            gains[unit] = _ZERO if peaks[r] < _TINY else peaks[r] * powers[r] * share


@kernel
def _dequantize(
    codes: Rows,
    gains: Rows,
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
    packed, codes_head, codes_token = codes
    flat_gains, gain_head, gain_token = gains
    y, _, row = divided(scratch, channels)
    scale = np.float32(1 / math.sqrt(channels))
    vectors = channels & -LANES
    first_levels = load(levels, 0)
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        unpack_row(packed, h * codes_head + t * codes_token, channels, bits, row)
        gain = get(flat_gains, h * gain_head + t * gain_token)
        h, t = following(h, t, tokens)
        if vectors and bits <= FEW:
            for i in range(0, vectors, LANES):
                store(y, i, butterflies(permuted(first_levels, load_codes(row, i))))
        else:
            for i in range(channels):
                y[i] = levels[row[i]]
            for i in range(0, vectors, LANES):
                store(y, i, butterflies(load(y, i)))
        transform(y, channels, scale)
        first = unit * channels
        for i in range(0, vectors, LANES):
            value = load(y, i) * load(sign, i) * splat(gain)
            narrow(out, first + i, minimum(maximum(value, splat(-_LIMIT)), splat(_LIMIT)))
        for i in range(vectors, channels):
            value = y[i] * sign[i] * gain
            narrow(out, first + i, min(max(value, -_LIMIT), _LIMIT))
