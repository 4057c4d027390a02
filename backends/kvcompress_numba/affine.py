"""Affine quantization: `quantize` and `dequantize` of `kvcompress.ops`, one pass over the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvcompress.arrays import dtype_name
from kvcompress.ops.affine import AffineSpec
from kvcompress_numba.arrays import NDArray, Rows, divided, empty, fold, following, rows
from kvcompress_numba.groups import (
    Sizes,
    channel_starts,
    code_row,
    codes_of,
    extremes,
    log_of,
    numbers_of,
    run_groups,
    store_range,
)
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.packing import one_plane, pack_row, unpack_row
from kvcompress_numba.threads import inline, kernel
from kvcompress_numba.vectors import (
    as_floats,
    field,
    get,
    load_codes,
    narrow,
    shift_left,
    store_codes,
)


def quantize(x: NDArray, *, spec: AffineSpec) -> tuple[NDArray, NDArray, NDArray]:
    """See `kvcompress.ops.quantize`."""
    *lead, _, _ = x.shape
    _, tokens, channels = shape = fold(x.shape)
    range_dtype = spec.range_dtype or dtype_name(x.dtype)
    codes, flat = empty((*lead, *spec.codes_shape(tokens, channels)), "uint8")
    range_shape = (*lead, *spec.range_shape(tokens, channels))
    (minimum, low), (maximum, high) = (
        empty(range_shape, range_dtype),
        empty(range_shape, range_dtype),
    )
    args = rows(x), flat, low, high
    run_groups(_quantize_tokens, _quantize_channels, spec, shape, 3 * channels + 2, *args)
    return codes, minimum, maximum


def dequantize(
    codes: NDArray,
    minimum: NDArray,
    maximum: NDArray,
    *,
    spec: AffineSpec,
    channels: int,
    dtype: str = "float32",
) -> NDArray:
    """See `kvcompress.ops.dequantize`."""
    *lead, tokens, _ = codes.shape
    out, flat = empty((*lead, tokens, channels), dtype)
    shape = math.prod(lead), tokens, channels
    args = rows(codes), rows(minimum), rows(maximum), flat
    run_groups(_dequantize_tokens, _dequantize_channels, spec, shape, 3 * channels + 2, *args)
    return out


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
    if one_plane(n, bits):
        size = n * bits >> 3
        for j in range(0, size, LANES):
            byte = codes_of(x, first, starts, inverses, log, j, qmax)
            for i in range(1, 8 // bits):
                code = codes_of(x, first, starts, inverses, log, i * size + j, qmax)
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
                step = numbers_of(steps, begin + j, log)
                narrow(out, first + begin + j, code * step + numbers_of(starts, begin + j, log))
        return
    unpack_row(codes, at, n, bits, row)
    vectors = n & -LANES
    for i in range(0, vectors, LANES):
        value = as_floats(load_codes(row, i)) * numbers_of(steps, i, log)
        narrow(out, first + i, value + numbers_of(starts, i, log))
    for i in range(vectors, n):
        narrow(out, first + i, np.float32(row[i]) * steps[i >> log] + starts[i >> log])


@kernel
def _quantize_tokens(
    sizes: Sizes,
    x: Rows,
    codes: Any,
    minima: Any,
    maxima: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    tokens, channels, bits, size = sizes
    flat, head, token = x
    starts, inverses, row = divided(scratch, channels)
    groups = (channels + size - 1) // size
    log = log_of(size)
    qmax = np.float32((1 << bits) - 1)
    width = codes.size // (minima.size // groups)
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        first = h * head + t * token
        for group in range(groups):
            at = group * size
            n = min(size, channels - at)
            low, high = extremes(flat, first + at, n)
            start, inverse = store_range(minima, maxima, unit * groups + group, low, high, qmax)
            if log:
                starts[group], inverses[group] = start, inverse
            else:
                starts[at : at + n] = start
                inverses[at : at + n] = inverse
        to = unit * width
        if log:
            _encode_row(flat, first, channels, bits, starts, inverses, log, row, codes, to)
        else:
            _encode_row(flat, first, channels, bits, starts, inverses, 0, row, codes, to)
        h, t = following(h, t, tokens)


@kernel
def _quantize_channels(
    sizes: Sizes,
    x: Rows,
    codes: Any,
    minima: Any,
    maxima: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a group of tokens, all channels."""
    tokens, channels, bits, size = sizes
    flat, head, token = x
    starts, inverses, row = divided(scratch, channels)
    groups = (tokens + size - 1) // size
    qmax = np.float32((1 << bits) - 1)
    width = codes.size // (minima.size // groups // channels * tokens)
    for unit in range(begin, end):
        h, at = unit // groups, unit % groups * size
        n = min(size, tokens - at)
        first = h * head + at * token
        place = unit * channels
        channel_starts(x, first, n, channels, minima, maxima, place, qmax, starts, inverses)
        for t in range(n):
            here, to = first + t * token, (h * tokens + at + t) * width
            _encode_row(flat, here, channels, bits, starts, inverses, 0, row, codes, to)


@kernel
def _dequantize_tokens(
    sizes: Sizes,
    codes: Rows,
    minima: Rows,
    maxima: Rows,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    tokens, channels, bits, size = sizes
    packed, codes_head, codes_token = codes
    lows, low_head, low_token = minima
    highs, high_head, high_token = maxima
    starts, steps, row = divided(scratch, channels)
    groups = (channels + size - 1) // size
    log = log_of(size)
    share = np.float32(1.0 / ((1 << bits) - 1))
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        for group in range(groups):
            at = group * size
            n = min(size, channels - at)
            start = get(lows, h * low_head + t * low_token + group)
            high = get(highs, h * high_head + t * high_token + group)
            step = (high - start) * share
            if log:
                starts[group], steps[group] = start, step
            else:
                starts[at : at + n] = start
                steps[at : at + n] = step
        at, first = h * codes_head + t * codes_token, unit * channels
        if log:
            _decode_row(packed, at, channels, bits, starts, steps, log, row, out, first)
        else:
            _decode_row(packed, at, channels, bits, starts, steps, 0, row, out, first)
        h, t = following(h, t, tokens)


@kernel
def _dequantize_channels(
    sizes: Sizes,
    codes: Rows,
    minima: Rows,
    maxima: Rows,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a group of tokens, all channels."""
    tokens, channels, bits, size = sizes
    packed, codes_head, codes_token = codes
    lows, low_head, low_token = minima
    highs, high_head, high_token = maxima
    starts, steps, row = divided(scratch, channels)
    groups = (tokens + size - 1) // size
    share = np.float32(1.0 / ((1 << bits) - 1))
    for unit in range(begin, end):
        h, group = unit // groups, unit % groups
        for i in range(channels):
            starts[i] = get(lows, h * low_head + group * low_token + i)
            high = get(highs, h * high_head + group * high_token + i)
            steps[i] = (high - starts[i]) * share
        for t in range(group * size, min(tokens, (group + 1) * size)):
            at = h * codes_head + t * codes_token
            first = (h * tokens + t) * channels
            _decode_row(packed, at, channels, bits, starts, steps, 0, row, out, first)
