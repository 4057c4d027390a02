"""Launches of the kernels for codebooks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvcompress_cupy.launches.layout import THREADS, Launch, Rows, reciprocal
from kvcompress_cupy.sources import VECTOR_DIMS, WORDS, name

CODEBOOK = np.dtype(
    [("centroids", "u8"), ("column", "i4"), ("start", "u2"), ("dim", "u2")], align=True
)
"""`struct Codebook` of the kernels."""

BOOKS = 240
"""Codebooks that fit into the arguments of a launch, 4 KiB."""

CODEBOOKS = np.dtype([("books", CODEBOOK, (BOOKS,))], align=True)
"""`struct Codebooks` of the kernels."""


@lru_cache(maxsize=1024)
def nearest(x: Rows, *, size: int) -> Launch:
    """Launch of ``nearest(x, codebook, codes, ...)``."""
    dim, tile, shared = _search(x.channels)
    return Launch(
        "nearest",
        name("nearest", dim),
        -(-x.tokens // tile),
        THREADS,
        shared,
        (
            *map(np.int64, (x.tokens, x.token_stride)),
            *map(np.int32, (tile, x.channels, size)),
        ),
    )


@lru_cache(maxsize=1024)
def lookup(vectors: int, *, row_bytes: int, word: int, size: int, code_bytes: int) -> Launch:
    """Launch of ``lookup(codes, codebook, out, ...)`` that copies `word` bytes at once."""
    words = row_bytes // word
    tile = max(1, 4 * THREADS // words)
    return Launch(
        "lookup",
        name("lookup", WORDS[word]),
        -(-vectors // tile),
        THREADS,
        0,
        (
            np.int64(vectors),
            *map(np.int32, (tile, words)),
            reciprocal(words),
            *map(np.int32, (size, code_bytes)),
        ),
    )


def product_class(dim: int) -> int:
    """Length that vectors of `dim` channels are filled up to, one of `VECTOR_DIMS`."""
    return next((size for size in VECTOR_DIMS if size >= dim), 0)


def encode_product(x: Rows, *, books: np.ndarray, columns: int) -> Launch:
    """Launch of ``encode_product(x, codes, ...)`` for `books` of one `product_class`."""
    dim, tile, shared = _search(int(books["dim"][0]))
    tiles = -(-x.tokens // tile)
    return Launch(
        "encode_product",
        name("encode_product", dim),
        x.heads * tiles * len(books),
        THREADS,
        shared,
        (
            *map(np.int64, (x.tokens, x.head_stride, x.token_stride)),
            *map(np.int32, (tiles, tile, len(books), columns)),
            _codebooks(books),
        ),
    )


def decode_product(codes: Rows, *, books: np.ndarray, channels: int) -> Launch:
    """Launch of ``decode_product(codes, out, ...)``; `books` are some of the codebooks."""
    edges = np.concatenate([books["start"], books["dim"], [channels]])
    word = next(
        w for w in (4, 2, 1) if not np.any(edges % w) and not np.any(books["centroids"] % (4 * w))
    )
    words = channels // word
    tile = max(1, 8 * THREADS // words)
    tiles = -(-codes.tokens // tile)
    return Launch(
        "decode_product",
        name("decode_product", word),
        codes.heads * tiles,
        THREADS,
        -(-words // 16) * 16 + books.nbytes,
        (
            *map(np.int64, (codes.tokens, codes.head_stride, codes.token_stride)),
            *map(np.int32, (tiles, tile, len(books), words)),
            reciprocal(words),
            np.int32(channels),
            _codebooks(books),
        ),
    )


def _search(dim: int) -> tuple[int, int, int]:
    """Template, vectors of a block and shared memory of a search among centroids."""
    dim = product_class(dim)
    if dim == 0:
        return 0, THREADS, 4 * 256
    vectors = 4 if dim <= 8 else 2 if dim == 16 else 1
    return dim, THREADS * vectors, 4 * 256 * (dim + 1)


def _codebooks(books: np.ndarray) -> np.ndarray:
    out = np.zeros((), CODEBOOKS)
    out["books"][: len(books)] = books
    return out
