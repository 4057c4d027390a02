"""Product quantization with a codebook for every place: one byte for every sub-vector."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcompress.arrays import (
    Array,
    HostArray,
    array_namespace,
    device,
    first_largest,
    look_up,
    map_blocks,
)
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.kmeans import DISTANCES, excess
from kvcompress.ops.registry import Nearest, operation

CODES = 256
"""Centroids of a codebook: what a byte tells apart."""


def _encode_examples(inputs: Inputs) -> Iterator[Call]:
    """Codebooks of 4 channels; what is left over comes first, so that no other is aligned."""
    heads, _, channels = inputs.shape
    dims = [channels % 4] * (channels % 4 > 0) + [4] * (channels // 4)
    books = [inputs.codebook((heads, CODES, dim)) for dim in dims]
    yield Call((inputs.tensor(extreme=False), *books), label=f"{CODES} codes of 4 values")


def _excess(call: Call, codes: HostArray) -> tuple[HostArray, HostArray]:
    """`kvcompress.ops.kmeans.excess` of every sub-vector of every head."""
    x, *books = call.arrays
    parts = np.split(x, np.cumsum([book.shape[-1] for book in books])[:-1], axis=-1)
    found = [
        excess(part[head], book[head], codes[head, :, i])
        for i, (part, book) in enumerate(zip(parts, books, strict=True))
        for head in range(x.shape[0])
    ]
    worse, bound = zip(*found, strict=True) if found else ([np.empty(0)], [np.empty(0)])
    return np.concatenate(worse), np.concatenate(bound)


@operation(_encode_examples, Nearest(_excess), dtypes=("float32",))
def encode_product(x: Array, *codebooks: Array) -> Array:
    """Find the nearest centroid of every sub-vector.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, float32
    *codebooks : arrays ``[heads, 256, dim]``, float32
        One for each sub-vector, in the order of the channels; their `dim` add up to `channels`.

    Returns
    -------
    array ``[heads, tokens, len(codebooks)]``, uint8
    """
    xp = array_namespace(x, *codebooks)
    heads = x.shape[0]
    tables = []
    for book in codebooks:
        half = xp.sum(book * book, axis=-1, keepdims=True) / 2
        # One more channel, so that a product with a centroid c is <x, c> - |c|^2 / 2.
        tables.append(xp.matrix_transpose(xp.concat([book, -half], axis=-1)))

    def block(rows: Array) -> Array:
        one, at, codes = xp.ones_like(rows[..., :1]), 0, []
        for table in tables:
            dim = table.shape[-2] - 1
            # Contiguous, or a matrix product takes several times as long.
            part = xp.permute_dims(xp.concat([rows[..., at : at + dim], one], axis=-1), (1, 0, 2))
            at += dim
            codes.append(xp.astype(first_largest(part @ table), xp.uint8))
        return xp.permute_dims(xp.stack(codes, axis=-1), (1, 0, 2))

    rows = max(1, DISTANCES // max(1, heads * CODES))
    return xp.permute_dims(map_blocks(block, rows, xp.permute_dims(x, (1, 0, 2))), (1, 0, 2))


def _decode_examples(inputs: Inputs) -> Iterator[Call]:
    for call in _encode_examples(inputs):
        x, *books = call.arrays
        codes = inputs.integers((*x.shape[:-1], len(books)), CODES)
        yield Call((codes, *books), label=call.label, source=x)


@operation(_decode_examples, dtypes=("float32",))
def decode_product(codes: Array, *codebooks: Array) -> Array:
    """Look up the centroids that the codes stand for, side by side.

    Parameters
    ----------
    codes : array ``[heads, tokens, len(codebooks)]``, uint8
    *codebooks : arrays ``[heads, 256, dim]``

    Returns
    -------
    array ``[heads, tokens, channels]``, dtype of the codebooks
    """
    xp = array_namespace(codes, *codebooks)
    heads = codes.shape[0]
    offset = xp.arange(heads, dtype=xp.int32, device=device(codes))[:, None, None] * CODES
    index = xp.astype(codes, xp.int32) + offset
    parts = []
    for i, codebook in enumerate(codebooks):
        rows = xp.reshape(codebook, (heads * CODES, codebook.shape[-1]))
        parts.append(look_up(rows, index[..., i]))
    return xp.concat(parts, axis=-1)
