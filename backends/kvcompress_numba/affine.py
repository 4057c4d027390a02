"""Affine quantization: `quantize` and `dequantize` of `kvcompress.ops`, one pass over the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvcompress._namespace import dtype_name
from kvcompress.ops.affine import TINY, AffineSpec
from kvcompress_numba.arrays import NDArray, divided, empty, fold, following, rows
from kvcompress_numba.packing import one_plane, pack_row, unpack_row
from kvcompress_numba.threads import inline, kernel, run
from kvcompress_numba.vectors import (
    LANES,
    as_bits,
    as_floats,
    field,
    get,
    largest,
    load,
    load_codes,
    maximum,
    minimum,
    narrow,
    shift_left,
    smallest,
    splat,
    store,
    store_codes,
)

_TINY, _ZERO = np.float32(TINY), np.float32(0)
_WHOLE = np.float32(1.5 * 2**23)
"""Added to a number from 0 to 255, rounds it to a whole one, half to even, in the low byte."""


def quantize(x: NDArray, *, spec: AffineSpec) -> tuple[NDArray, NDArray, NDArray]:
    """See `kvcompress.ops.quantize`."""
    *lead, _, _ = x.shape
    heads, tokens, channels = fold(x.shape)
    ends_dtype = spec.ends_dtype or dtype_name(x.dtype)
    codes, flat = empty((*lead, *spec.codes_shape(tokens, channels)), "uint8")
    shape = (*lead, *spec.ends_shape(tokens, channels))
    (lower, low), (upper, high) = empty(shape, ends_dtype), empty(shape, ends_dtype)
    scratch = 3 * channels + 2
    args = *rows(x), tokens, channels, spec.bits, spec.group_size, flat, low, high
    if spec.axis == "token":
        run(_quantize_tokens, heads * tokens, channels, scratch, *args)
    else:
        groups = heads * -(-tokens // spec.group_size)
        run(_quantize_channels, groups, min(tokens, spec.group_size) * channels, scratch, *args)
    return codes, lower, upper


def dequantize(
    codes: NDArray,
    lower: NDArray,
    upper: NDArray,
    *,
    spec: AffineSpec,
    channels: int,
    dtype: str = "float32",
) -> NDArray:
    """See `kvcompress.ops.dequantize`."""
    *lead, tokens, _ = codes.shape
    heads = math.prod(lead)
    out, flat = empty((*lead, tokens, channels), dtype)
    scratch = 3 * channels + 2
    args = *rows(codes), *rows(lower), *rows(upper), tokens, channels, spec.bits, spec.group_size
    if spec.axis == "token":
        run(_dequantize_tokens, heads * tokens, channels, scratch, *args, flat)
    else:
        groups = heads * -(-tokens // spec.group_size)
        run(
            _dequantize_channels,
            groups,
            min(tokens, spec.group_size) * channels,
            scratch,
            *args,
            flat,
        )
    return out


@inline
def ends(x: Any, first: int, n: int) -> Any:
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
def channel_ends(
    x: Any, first: int, token: int, n: int, channels: int, lows: Any, highs: Any
) -> None:
    """Smallest and largest of every channel of `n` tokens."""
    vectors = channels & -LANES
    for i in range(channels):
        lows[i] = highs[i] = get(x, first + i)
    for t in range(1, n):
        here = first + t * token
        for i in range(0, vectors, LANES):
            value = load(x, here + i)
            store(lows, i, minimum(load(lows, i), value))
            store(highs, i, maximum(load(highs, i), value))
        for i in range(vectors, channels):
            lows[i] = min(lows[i], get(x, here + i))
            highs[i] = max(highs[i], get(x, here + i))


@inline
def store_ends(lower: Any, upper: Any, at: int, low: Any, high: Any, qmax: Any) -> Any:
    """Store the ends of a group; return the lower one, and codes per unit of the source."""
    store(lower, at, _ZERO if abs(low) < _TINY else low)
    store(upper, at, _ZERO if abs(high) < _TINY else high)
    start = get(lower, at)
    extent = get(upper, at) - start
    return start, _ZERO if extent < _TINY else qmax / extent


@inline
def _log(size: int) -> int:
    """Binary logarithm of a group size, if vectors lie within groups; otherwise 0."""
    log = 0
    if size >= LANES and size & (size - 1) == 0:
        while size >> log > 1:
            log += 1
    return log


@inline
def _vector(numbers: Any, i: int, log: int) -> Any:
    """Numbers of 16 channels from `i` on; each stands for ``2**log``, 1 or at least 16."""
    return splat(numbers[i >> log]) if log else load(numbers, i)


@inline
def _codes(
    x: Any, first: int, starts: Any, inverses: Any, log: int, i: int, none: Any, most: Any
) -> Any:
    """Codes of 16 channels from `i` on; above the low byte there is more."""
    start, inverse = _vector(starts, i, log), _vector(inverses, i, log)
    scaled = (load(x, first + i) - start) * inverse
    return as_bits(minimum(maximum(scaled, none), most) + splat(_WHOLE))


@inline
def code_row(
    x: Any, first: int, n: int, qmax: Any, starts: Any, inverses: Any, log: int, row: Any
) -> None:
    """Codes of ``x[first : first + n]``, a byte each."""
    none, most = splat(_ZERO), splat(qmax)
    vectors = n & -LANES
    for i in range(0, vectors, LANES):
        store_codes(row, i, _codes(x, first, starts, inverses, log, i, none, most))
    for i in range(vectors, n):
        scaled = (get(x, first + i) - starts[i >> log]) * inverses[i >> log]
        row[i] = np.int64((min(max(scaled, _ZERO), qmax) + _WHOLE) - _WHOLE)


@inline
def _encode_row(
    x: Any,
    first: int,
    n: int,
    bits: int,
    starts: Any,
    inverses: Any,
    log: int,
    row: Any,
    codes: Any,
    at: int,
) -> None:
    """Quantize and pack ``x[first:]``; `row` has ``n + 8`` places to spare."""
    qmax = np.float32((1 << bits) - 1)
    none, most = splat(_ZERO), splat(qmax)
    if one_plane(n, bits):
        size = n * bits >> 3
        for j in range(0, size, LANES):
            byte = _codes(x, first, starts, inverses, log, j, none, most)
            for i in range(1, 8 // bits):
                code = _codes(x, first, starts, inverses, log, i * size + j, none, most)
                byte = byte | shift_left(code, i * bits)
            store_codes(codes, at + j, byte)
        return
    code_row(x, first, n, qmax, starts, inverses, log, row)
    pack_row(row, n, bits, codes, at)


@inline
def _decode_row(
    codes: Any,
    at: int,
    n: int,
    bits: int,
    starts: Any,
    steps: Any,
    log: int,
    row: Any,
    out: Any,
    first: int,
) -> None:
    """Unpack and dequantize to ``out[first:]``; `row` has ``n + 8`` places to spare."""
    if one_plane(n, bits):
        size, mask = n * bits >> 3, (1 << bits) - 1
        for i in range(8 // bits):
            begin = i * size
            for j in range(0, size, LANES):
                code = as_floats(field(load_codes(codes, at + j), i * bits, mask, 0))
                step = _vector(steps, begin + j, log)
                narrow(out, first + begin + j, code * step + _vector(starts, begin + j, log))
        return
    unpack_row(codes, at, n, bits, row)
    vectors = n & -LANES
    for i in range(0, vectors, LANES):
        value = as_floats(load_codes(row, i)) * _vector(steps, i, log)
        narrow(out, first + i, value + _vector(starts, i, log))
    for i in range(vectors, n):
        narrow(out, first + i, np.float32(row[i]) * steps[i >> log] + starts[i >> log])


@kernel
def _quantize_tokens(
    x: Any,
    head: int,
    token: int,
    tokens: int,
    channels: int,
    bits: int,
    size: int,
    codes: Any,
    lower: Any,
    upper: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    starts, inverses, row = divided(scratch, channels)
    groups = (channels + size - 1) // size
    log = _log(size)
    qmax = np.float32((1 << bits) - 1)
    width = codes.size // (lower.size // groups)
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        first = h * head + t * token
        for group in range(groups):
            at = group * size
            n = min(size, channels - at)
            low, high = ends(x, first + at, n)
            start, inverse = store_ends(lower, upper, unit * groups + group, low, high, qmax)
            if log:
                starts[group], inverses[group] = start, inverse
            else:
                starts[at : at + n] = start
                inverses[at : at + n] = inverse
        to = unit * width
        if log:
            _encode_row(x, first, channels, bits, starts, inverses, log, row, codes, to)
        else:
            _encode_row(x, first, channels, bits, starts, inverses, 0, row, codes, to)
        h, t = following(h, t, tokens)


@kernel
def _quantize_channels(
    x: Any,
    head: int,
    token: int,
    tokens: int,
    channels: int,
    bits: int,
    size: int,
    codes: Any,
    lower: Any,
    upper: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a group of tokens, all channels."""
    lows, highs, row = divided(scratch, channels)
    groups = (tokens + size - 1) // size
    qmax = np.float32((1 << bits) - 1)
    width = codes.size // (lower.size // groups // channels * tokens)
    for unit in range(begin, end):
        h, at = unit // groups, unit % groups * size
        n = min(size, tokens - at)
        first = h * head + at * token
        channel_ends(x, first, token, n, channels, lows, highs)
        # From here on: where a channel starts, and codes per unit of the source.
        for i in range(channels):
            lows[i], highs[i] = store_ends(
                lower, upper, unit * channels + i, lows[i], highs[i], qmax
            )
        for t in range(n):
            to = (h * tokens + at + t) * width
            _encode_row(x, first + t * token, channels, bits, lows, highs, 0, row, codes, to)


@kernel
def _dequantize_tokens(
    codes: Any,
    codes_head: int,
    codes_token: int,
    lower: Any,
    lower_head: int,
    lower_token: int,
    upper: Any,
    upper_head: int,
    upper_token: int,
    tokens: int,
    channels: int,
    bits: int,
    size: int,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    starts, steps, row = divided(scratch, channels)
    groups = (channels + size - 1) // size
    log = _log(size)
    share = np.float32(1.0 / ((1 << bits) - 1))
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        for group in range(groups):
            at = group * size
            n = min(size, channels - at)
            start = get(lower, h * lower_head + t * lower_token + group)
            high = get(upper, h * upper_head + t * upper_token + group)
            step = (high - start) * share
            if log:
                starts[group], steps[group] = start, step
            else:
                starts[at : at + n] = start
                steps[at : at + n] = step
        at, first = h * codes_head + t * codes_token, unit * channels
        if log:
            _decode_row(codes, at, channels, bits, starts, steps, log, row, out, first)
        else:
            _decode_row(codes, at, channels, bits, starts, steps, 0, row, out, first)
        h, t = following(h, t, tokens)


@kernel
def _dequantize_channels(
    codes: Any,
    codes_head: int,
    codes_token: int,
    lower: Any,
    lower_head: int,
    lower_token: int,
    upper: Any,
    upper_head: int,
    upper_token: int,
    tokens: int,
    channels: int,
    bits: int,
    size: int,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a group of tokens, all channels."""
    starts, steps, row = divided(scratch, channels)
    groups = (tokens + size - 1) // size
    share = np.float32(1.0 / ((1 << bits) - 1))
    for unit in range(begin, end):
        h, group = unit // groups, unit % groups
        for i in range(channels):
            starts[i] = get(lower, h * lower_head + group * lower_token + i)
            high = get(upper, h * upper_head + group * upper_token + i)
            steps[i] = (high - starts[i]) * share
        for t in range(group * size, min(tokens, (group + 1) * size)):
            at = h * codes_head + t * codes_token
            first = (h * tokens + t) * channels
            _decode_row(codes, at, channels, bits, starts, steps, 0, row, out, first)
