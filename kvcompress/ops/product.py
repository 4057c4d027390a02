"""Product quantization with a codebook for every place: one byte for every sub-vector."""

from __future__ import annotations

from kvcompress.arrays import Array, array_namespace, device, first_largest, look_up, map_blocks
from kvcompress.ops.kmeans import DISTANCES

CODES = 256
"""Centroids of a codebook: what a byte tells apart."""


def encode_product(x: Array, *codebooks: Array) -> Array:
    """Nearest centroid of every sub-vector.

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


def decode_product(codes: Array, *codebooks: Array) -> Array:
    """Centroids that the codes stand for, side by side.

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
