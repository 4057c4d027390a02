"""Launches of the kernels for codes of different widths."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvcompress.ops.packing import packed_size
from kvcompress_cupy.launches.layout import THREADS, Launch, Rows, reciprocal
from kvcompress_cupy.sources import name

COMPONENTS = 1024
"""Most components of a row, whose places are in shared memory."""


@lru_cache(maxsize=1024)
def quantize_allocated(x: Rows, *, bits: int, aligned: bool) -> Launch:
    """Launch of ``quantize_allocated(x, depths, codes, ...)``."""
    n = x.channels
    width = 4 if aligned else 1
    pitch, size = -(-n // 4) * 4, packed_size(bits, 1)
    tile_rows, tiles = _tiles(x, pitch)
    return Launch(
        "quantize_allocated",
        name("quantize_allocated", width),
        x.heads * tiles,
        THREADS,
        tile_rows * pitch + pitch + 2 * bits,
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, tiles, tile_rows, n)),
            reciprocal(n // width),
            *map(np.int32, (pitch, bits, size)),
            reciprocal(size),
        ),
    )


@lru_cache(maxsize=1024)
def dequantize_allocated(codes: Rows, *, bits: int, channels: int) -> Launch:
    """Launch of ``dequantize_allocated(codes, depths, out, ...)``."""
    width = 4 if channels % 4 == 0 else 1
    tile_rows, tiles = _tiles(codes, channels)
    return Launch(
        "dequantize_allocated",
        name("dequantize_allocated", width),
        codes.heads * tiles,
        THREADS,
        4 * channels + -(-channels // 4) * 4 + tile_rows * codes.channels,
        (
            *map(np.int64, (codes.tokens, codes.head_stride)),
            *map(np.int32, (codes.token_stride, tiles, tile_rows, channels)),
            reciprocal(channels // width),
            *map(np.int32, (bits, codes.channels)),
            reciprocal(codes.channels),
        ),
    )


def _tiles(rows: Rows, size: int) -> tuple[int, int]:
    """Rows of a tile, of `size` values or bytes each, and tiles of a head."""
    tile_rows = max(1, min(64 * THREADS // size, rows.tokens))
    return tile_rows, -(-rows.tokens // tile_rows)
