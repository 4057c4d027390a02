"""Launches of the rotated kernels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvcompress.arrays import itemsize
from kvcompress.ops.rotated import RotatedSpec
from kvcompress_cupy import tables
from kvcompress_cupy.launches.layout import THREADS, TYPES, Launch, Rows, turns
from kvcompress_cupy.sources import CTYPES, name


@lru_cache(maxsize=1024)
def quantize_rotated(x: Rows, *, spec: RotatedSpec, dtype: str, aligned: bool) -> Launch:
    """Launch of ``quantize_rotated(x, codes, gain, ...)``."""
    x = x.flat()
    dim = x.channels
    tile_rows = THREADS * 32 // dim
    tiles = -(-x.tokens // tile_rows)
    taken = turns(tiles * x.heads)
    blocks = -(-tiles // taken)
    pitch = max(dim + dim // 4, dim + 16)
    _, steps = tables.steps(spec.bits)
    return Launch(
        "quantize_rotated",
        name("quantize_rotated", spec.bits, dim, CTYPES[dtype]),
        x.heads * blocks,
        THREADS,
        tile_rows * pitch + steps.nbytes + 8 * 2**spec.bits,
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, blocks, taken, aligned)),
            tables.signs(dim, spec.seed, run=16 // itemsize(dtype), itemsize=itemsize(dtype)),
        ),
    )


@lru_cache(maxsize=1024)
def dequantize_rotated(
    codes: Rows,
    gain: Rows,
    *,
    spec: RotatedSpec,
    channels: int,
    gain_dtype: str,
    dtype: str,
    aligned: bool,
) -> Launch:
    """Launch of ``dequantize_rotated(codes, gain, out, ...)``."""
    if codes.flat().heads == gain.flat().heads == 1:
        codes, gain = codes.flat(), gain.flat()
    tile_rows = THREADS * 32 // channels
    tiles = -(-codes.tokens // tile_rows)
    strides = codes.head_stride, codes.token_stride, gain.head_stride, gain.token_stride
    return Launch(
        "dequantize_rotated",
        name("dequantize_rotated", spec.bits, channels, CTYPES[dtype]),
        codes.heads * tiles,
        THREADS,
        4 * 2**spec.bits,
        (
            *map(np.int64, (codes.tokens, *strides)),
            *map(np.int32, (tiles, TYPES[gain_dtype], aligned)),
            tables.signs(channels, spec.seed, run=4, itemsize=itemsize(dtype)),
        ),
    )
