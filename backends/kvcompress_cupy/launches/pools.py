"""Launches of `within`, `gather_slots` and `scatter_slots`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvcompress.arrays import dtype_of, namespace_of
from kvcompress_cupy.launches.layout import THREADS, Launch, Rows, reciprocal
from kvcompress_cupy.sources import CTYPES, WORDS, name


@lru_cache(maxsize=1024)
def within(x: Rows, *, dtype: str, limit: float, aligned: bool) -> Launch:
    """Launch of ``within(x, slots, out, ...)``."""
    x = x.flat()
    kind = np.dtype(dtype_of(namespace_of(np), dtype))
    vectors = -(-x.channels * kind.itemsize // 16)
    tile_rows = max(1, min(16 * THREADS // vectors, x.tokens))
    tiles = -(-x.tokens // tile_rows)
    bits = np.full(4 // kind.itemsize, limit, kind).view("uint32")[0]
    return Launch(
        "within",
        name("within", CTYPES[dtype]),
        x.heads * tiles,
        THREADS,
        0,
        (
            *map(np.int64, (x.tokens, x.head_stride)),
            *map(np.int32, (x.token_stride, tiles, tile_rows, x.channels, vectors)),
            reciprocal(vectors),
            np.int32(aligned),
            bits,
        ),
    )


@lru_cache(maxsize=1024)
def gather_slots(pool: Rows, *, tokens: int, itemsize: int, offset: int) -> Launch:
    """Launch of ``gather_slots(pool, slots, out, ...)``.

    `offset`: of all addresses from multiples of 16 bytes.
    """
    word = next(word for word in WORDS if pool.aligned(offset, itemsize, word))
    return _copy("gather_slots", pool, tokens, itemsize, word, _strides(pool, itemsize, word))


@lru_cache(maxsize=1024)
def scatter_slots(pool: Rows, x: Rows, *, itemsize: int, offset: int) -> Launch:
    """Launch of ``scatter_slots(slots, x, pool, ...)``; see `gather_slots`."""
    both = pool, x
    word = next(w for w in WORDS if all(rows.aligned(offset, itemsize, w) for rows in both))
    strides = (*_strides(pool, itemsize, word), *_strides(x, itemsize, word))
    return _copy("scatter_slots", pool, x.tokens, itemsize, word, strides)


def _copy(
    family: str, pool: Rows, tokens: int, itemsize: int, word: int, strides: tuple[np.int64, ...]
) -> Launch:
    words = pool.channels * itemsize // word
    size = pool.heads * words
    tile = max(1, 8 * THREADS // size)
    return Launch(
        family,
        name(family, WORDS[word]),
        -(-tokens // tile),
        THREADS,
        0,
        (
            np.int64(tokens),
            *map(np.int32, (tile, pool.heads, words)),
            *map(reciprocal, (size, words)),
            *strides,
        ),
    )


def _strides(rows: Rows, itemsize: int, word: int) -> tuple[np.int64, ...]:
    """Of heads and tokens, in words."""
    return tuple(np.int64(s * itemsize // word) for s in (rows.head_stride, rows.token_stride))
