"""Launches of the affine kernels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.packing import packed_size
from kvcompress_cupy.launches.layout import SHARED, THREADS, TYPES, Launch, Rows, reciprocal, turns
from kvcompress_cupy.sources import CTYPES, GROUPS, name

COLUMNS = 1024
"""Most channels of a row whose groups run along the tokens: a block takes whole rows."""

HELD = 256
"""Most channels for which it may hold a group in registers and shared memory."""


def has_template(group_size: int, length: int) -> bool:
    """Tell whether a template quantizes groups of `group_size` out of `length` values."""
    return group_size >= length or group_size in GROUPS


def group_template(group_size: int, length: int) -> int:
    """Group size of that template; 0 is one group of any length."""
    if group_size < length:
        return group_size
    return next((size for size in GROUPS if size >= length), 0)


@lru_cache(maxsize=1024)
def quantize_token(
    x: Rows, *, spec: AffineSpec, dtype: str, range_dtype: str, aligned: bool
) -> Launch:
    """Launch of ``quantize_token(x, codes, lower, upper, ...)``."""
    x = x.flat()
    group = group_template(spec.group_size, x.channels)
    n, size = x.channels, 16 // (2 if dtype != "float32" else 4)
    groups = -(-n // group) if group else 1
    team = group // size if group else 32
    pitch = -(-n // 16) * 16
    tile_rows = max(1, THREADS // team * 4 // groups)
    tile_rows = max(1, min(tile_rows, SHARED // pitch, x.tokens))
    tiles = -(-x.tokens // tile_rows)
    chunk = pack_chunk(n, spec.bits)
    return Launch(
        "quantize_token",
        name("quantize_token", spec.bits, group, CTYPES[dtype]),
        x.heads * tiles,
        THREADS,
        tile_rows * pitch,
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, tiles, tile_rows, n, groups)),
            reciprocal(groups),
            *map(np.int32, (pitch, TYPES[range_dtype], aligned, chunk)),
            reciprocal(packed_size(n, spec.bits) // chunk),
        ),
    )


@lru_cache(maxsize=1024)
def quantize_channel(
    x: Rows, *, spec: AffineSpec, dtype: str, range_dtype: str, aligned: bool
) -> Launch:
    """Launch of ``quantize_channel(x, codes, lower, upper, ...)``."""
    n, size = x.channels, 16 // (2 if dtype != "float32" else 4)
    group = group_template(spec.group_size, x.tokens) if n <= HELD else 0
    length = group or min(spec.group_size, x.tokens)
    groups = -(-x.tokens // length)
    columns = -(-n // size)
    lanes = min(16, 16 * HELD // (columns * size))
    pitch = -(-n // 16) * 16
    tile_rows = group or min(128, 128 * HELD // pitch)
    ends, found = 2 * 4 * columns * size, lanes * 2 * 4 * columns * size
    chunk = pack_chunk(n, spec.bits)
    return Launch(
        "quantize_channel",
        name("quantize_channel", spec.bits, group, CTYPES[dtype]),
        x.heads * groups,
        columns * lanes,
        ends + max(found, tile_rows * pitch),
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, length, groups, n, columns, tile_rows, pitch)),
            *map(np.int32, (TYPES[range_dtype], aligned, chunk)),
            reciprocal(packed_size(n, spec.bits) // chunk),
        ),
    )


@lru_cache(maxsize=1024)
def dequantize(
    codes: Rows,
    ends: Rows,
    *,
    spec: AffineSpec,
    channels: int,
    dtype: str,
    range_dtype: str,
    aligned: bool,
) -> Launch:
    """Launch of ``dequantize(codes, lower, upper, out, ...)``."""
    token = spec.axis == "token"
    group = group_template(spec.group_size, channels if token else codes.tokens)
    if token and codes.flat().heads == ends.flat().heads == 1:
        codes, ends = codes.flat(), ends.flat()
    quads = aligned and pack_chunk(channels, spec.bits) >= 4
    columns = min(THREADS, channels // 4 if quads else channels)
    lanes = THREADS // columns
    rows = 8 * lanes
    rows *= turns(codes.heads * codes.tokens // rows)
    tile_rows = min(codes.tokens, rows if token else group or 128)
    tiles = -(-codes.tokens // tile_rows)
    strides = codes.token_stride, ends.token_stride
    return Launch(
        "dequantize",
        name("dequantize", spec.bits, group, int(token), CTYPES[dtype]),
        codes.heads * tiles,
        columns * lanes,
        0,
        (
            *map(np.int64, (codes.tokens, codes.head_stride, ends.head_stride)),
            *map(np.int32, (*strides, tiles, tile_rows, channels, columns)),
            *map(np.int32, (TYPES[range_dtype], quads)),
        ),
    )


def pack_chunk(n: int, bits: int) -> int:
    """Bytes that `pack_rows` stores at once: 16 or 4 where all planes are full and allow it."""
    widths = (2, 1) if bits == 3 else (bits,)
    for chunk in (16, 4):
        if all(n * width % (8 * chunk) == 0 for width in widths):
            return chunk
    return 1
