"""Launches of the kernels that clip groups."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvcompress.arrays import itemsize
from kvcompress.ops.affine import AffineSpec
from kvcompress_cupy.launches.affine import group_template
from kvcompress_cupy.launches.layout import THREADS, TYPES, Launch, Rows, reciprocal, turns
from kvcompress_cupy.sources import CTYPES, name

TABLE = 257 * 128
"""Bytes of the table of errors, in shared memory."""

_EACH = 8  # values of a group that a thread takes at a time


def load_bytes(spec: AffineSpec, tokens: int, dtype: str) -> int:
    """Bytes that a thread loads at once."""
    if spec.axis == "token":
        return 4 * itemsize(dtype)
    return 4 if group_template(spec.group_size, tokens) <= 32 else 8


@lru_cache(maxsize=1024)
def clip_token(x: Rows, *, spec: AffineSpec, dtype: str, range_dtype: str, aligned: bool) -> Launch:
    """Launch of ``clip_token(x, out, ...)``."""
    x = x.flat()
    n, group = x.channels, group_template(spec.group_size, x.channels)
    groups = -(-n // group) if group else 1
    tile_rows = max(1, 4 * THREADS * _EACH // (group or 32 * _EACH) // groups)
    tile_rows = min(tile_rows * turns(x.heads * x.tokens // tile_rows), x.tokens)
    tiles = -(-x.tokens // tile_rows)
    return Launch(
        "clip_token",
        name("clip_token", group, CTYPES[dtype]),
        x.heads * tiles,
        THREADS,
        TABLE,
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, tiles, tile_rows, n, groups)),
            reciprocal(groups),
            *map(np.int32, (spec.bits, TYPES[range_dtype], aligned)),
        ),
    )


@lru_cache(maxsize=1024)
def clip_channel(
    x: Rows, *, spec: AffineSpec, dtype: str, range_dtype: str, aligned: bool
) -> Launch:
    """Launch of ``clip_channel(x, out, ...)``."""
    group = group_template(spec.group_size, x.tokens)
    length = group or x.tokens
    slices = -(-x.channels * itemsize(dtype) // (16 if group == 128 else 32))
    units = -(-x.tokens // length) * slices
    warps = THREADS // 32
    tile_units = min(units, warps * turns(x.heads * units // warps))
    tiles = -(-units // tile_units)
    return Launch(
        "clip_channel",
        name("clip_channel", group, CTYPES[dtype]),
        x.heads * tiles,
        THREADS,
        TABLE,
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, length, units, tiles, tile_units, slices)),
            *map(np.int32, (x.channels, spec.bits, TYPES[range_dtype], aligned)),
        ),
    )
