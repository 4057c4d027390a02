"""How arrays lie and how kernels are launched over them: pure functions of shapes and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.packing import packed_size
from kvcompress.ops.rotated import RotatedSpec
from kvcompress_cupy import tables
from kvcompress_cupy.sources import CTYPES, GROUPS, VECTOR_DIMS, WORDS, name

SHARED = 48 * 1024
"""Bytes of shared memory that every GPU gives a block without being asked."""

CHANNELS = 2**15
"""Most channels of a row: `reciprocal` is exact up to there."""

COLUMNS = 256
"""Most channels of a row whose groups run along the tokens: a block takes whole rows."""

THREADS = 256
"""Threads of a block, where a kernel leaves the choice."""

TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
"""`enum Type` of the kernels."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, but for its arrays, which come before `scalars`."""

    family: str
    name: str
    grid: int
    block: int
    shared: int
    scalars: tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of neighbouring channels: `heads` times `tokens`, strides in elements."""

    heads: int
    tokens: int
    channels: int
    head_stride: int
    token_stride: int

    def flat(self) -> Rows:
        """Return the same rows as those of one head, where their stride is uniform."""
        if self.heads > 1 and self.tokens > 1:
            if self.head_stride != self.tokens * self.token_stride:
                return self
            stride = self.token_stride
        else:
            stride = self.token_stride if self.heads == 1 else self.head_stride
        return Rows(1, self.heads * self.tokens, self.channels, 0, stride)

    def aligned(self, pointer: int, itemsize: int, to: int = 16) -> bool:
        """Whether all rows begin and end at multiples of `to` bytes."""
        strides = self.token_stride, self.head_stride
        offsets = (pointer, self.channels * itemsize, *(s * itemsize for s in strides))
        return all(offset % to == 0 for offset in offsets)


def rows(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Rows | None:
    """Lay ``[..., tokens, channels]`` out as `Rows`; None where only a copy can.

    Parameters
    ----------
    shape, strides : sequences of int
        Strides in bytes.
    itemsize : int
    """
    *lead, tokens, channels = shape
    if any(stride % itemsize for stride in strides):
        return None
    *steps, token_stride, channel_stride = (stride // itemsize for stride in strides)
    if channels > 1 and channel_stride != 1:
        return None
    heads, head_stride = 1, 0
    for size, step in zip(reversed(lead), reversed(steps), strict=True):
        if size == 1:
            continue
        if heads == 1:
            heads, head_stride = size, step
        elif step == heads * head_stride:
            heads *= size
        else:
            return None
    return Rows(heads, tokens, channels, head_stride, token_stride if tokens > 1 else 0)


def contiguous_rows(shape: Sequence[int]) -> Rows:
    """Lay an array in C order out."""
    *lead, tokens, channels = shape
    return Rows(math.prod(lead), tokens, channels, tokens * channels, channels)


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
    x: Rows, *, spec: AffineSpec, dtype: str, ends_dtype: str, aligned: bool
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
            *map(np.int64, (x.tokens, x.head_stride, x.token_stride)),
            *map(np.int32, (tiles, tile_rows, n, groups)),
            reciprocal(groups),
            *map(np.int32, (pitch, TYPES[ends_dtype], aligned, chunk)),
            reciprocal(packed_size(n, spec.bits) // chunk),
        ),
    )


@lru_cache(maxsize=1024)
def quantize_channel(
    x: Rows, *, spec: AffineSpec, dtype: str, ends_dtype: str, aligned: bool
) -> Launch:
    """Launch of ``quantize_channel(x, codes, lower, upper, ...)``."""
    group = group_template(spec.group_size, x.tokens)
    lanes, chunk_tokens = 16, 128
    n, size = x.channels, 16 // (2 if dtype != "float32" else 4)
    groups = -(-x.tokens // group) if group else 1
    columns = -(-n // size)
    pitch = -(-n // 16) * 16
    ends, found = 2 * 4 * columns * size, lanes * 2 * 4 * columns * size
    chunk = pack_chunk(n, spec.bits)
    return Launch(
        "quantize_channel",
        name("quantize_channel", spec.bits, group, CTYPES[dtype]),
        x.heads * groups,
        columns * lanes,
        ends + max(found, (group or chunk_tokens) * pitch),
        (
            *map(np.int64, (x.tokens, x.head_stride, x.token_stride)),
            *map(np.int32, (groups, n, columns, pitch, TYPES[ends_dtype], aligned, chunk)),
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
    ends_dtype: str,
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
    tile_rows = min(codes.tokens, 8 * lanes if token else group or 128)
    tiles = -(-codes.tokens // tile_rows)
    strides = codes.head_stride, codes.token_stride, ends.head_stride, ends.token_stride
    return Launch(
        "dequantize",
        name("dequantize", spec.bits, group, int(token), CTYPES[dtype]),
        codes.heads * tiles,
        columns * lanes,
        0,
        (
            *map(np.int64, (codes.tokens, *strides)),
            *map(np.int32, (tiles, tile_rows, channels, columns, TYPES[ends_dtype], quads)),
        ),
    )


@lru_cache(maxsize=1024)
def quantize_rotated(x: Rows, *, spec: RotatedSpec, dtype: str, aligned: bool) -> Launch:
    """Launch of ``quantize_rotated(x, codes, gain, ...)``."""
    x = x.flat()
    dim = x.channels
    tile_rows = THREADS * 32 // dim
    tiles = -(-x.tokens // tile_rows)
    pitch = max(dim + dim // 4, dim + 16)
    _, _, steps = tables.steps(spec.bits)
    return Launch(
        "quantize_rotated",
        name("quantize_rotated", spec.bits, dim, CTYPES[dtype]),
        x.heads * tiles,
        THREADS,
        tile_rows * pitch + 8 * (len(steps) + 2**spec.bits),
        (
            *map(np.int64, (x.tokens, x.head_stride, x.token_stride)),
            *map(np.int32, (tiles, aligned)),
            *tables.signs(dim, spec.seed),
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
            *tables.signs(channels, spec.seed),
        ),
    )


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


def pack_chunk(n: int, bits: int) -> int:
    """Bytes that `pack_rows` stores at once: 16 or 4 where all planes are full and allow it."""
    widths = (2, 1) if bits == 3 else (bits,)
    for chunk in (16, 4):
        if all(n * width % (8 * chunk) == 0 for width in widths):
            return chunk
    return 1


def reciprocal(divisor: int) -> np.uint32:
    """Return what `divide` of the kernels takes for a divisor."""
    return np.uint32(-(-(2**31) // divisor))
