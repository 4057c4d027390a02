"""Vector quantization: k-means codebooks, nearest codes, and their lookup.

Lloyd's algorithm on a random sample, as in product quantization (Jegou et al. 2011,
doi 10.1109/TPAMI.2010.57).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcompress._namespace import Array, array_namespace, device

SAMPLES_PER_CODE = 32
"""Vectors that train one centroid; more hardly move it."""

_BLOCK = 2**22
"""Distances held at a time, unless the input itself is larger."""


def kmeans(x: Array, codebook_size: int, *, iterations: int, seed: int) -> Array:
    """Train one codebook for every set of vectors.

    Parameters
    ----------
    x : array ``[sets, vectors, dim]``, float32
    codebook_size : int
    iterations : int
        Rounds of Lloyd's algorithm.
    seed : int
        Chooses the training sample and the first centroids.

    Returns
    -------
    array ``[sets, codebook_size, dim]``, float32
        Zeros if there are no vectors.
    """
    xp = array_namespace(x)
    sets, vectors, dim = x.shape
    if vectors == 0:
        return xp.zeros((sets, codebook_size, dim), dtype=xp.float32, device=device(x))
    order = np.random.default_rng(seed).permutation(vectors)
    x = _take(x, order[: SAMPLES_PER_CODE * codebook_size])
    codebook = _take(x, np.arange(codebook_size) % x.shape[1])
    codes = xp.arange(codebook_size, dtype=xp.int32, device=device(x))
    for _ in range(iterations):
        sums = xp.zeros_like(codebook)
        counts = xp.zeros_like(codebook[..., :1])
        for block in _blocks(x, codebook_size):
            member = nearest(x[:, block, :], codebook)[..., None, :] == codes[:, None]
            member = xp.astype(member, xp.float32)
            sums = sums + member @ x[:, block, :]
            counts = counts + xp.sum(member, axis=-1, keepdims=True)
        # A centroid that lost all its vectors stays where it was.
        codebook = xp.where(counts > 0, sums / xp.where(counts > 0, counts, 1.0), codebook)
    return codebook


def nearest(x: Array, codebook: Array) -> Array:
    """Index of the centroid nearest to every vector, the first of equals.

    Parameters
    ----------
    x : array ``[sets, vectors, dim]``, float32
    codebook : array ``[sets, codebook_size, dim]``, float32

    Returns
    -------
    array ``[sets, vectors]``, int32
    """
    xp = array_namespace(x, codebook)
    transposed = xp.matrix_transpose(codebook)
    half_norm = xp.sum(transposed * transposed, axis=-2, keepdims=True) / 2
    codes = [
        xp.astype(xp.argmin(half_norm - x[:, block, :] @ transposed, axis=-1), xp.int32)
        for block in _blocks(x, codebook.shape[1])
    ]
    return codes[0] if len(codes) == 1 else xp.concat(codes, axis=-1)


def lookup(codes: Array, codebook: Array) -> Array:
    """Centroids that the codes stand for.

    Parameters
    ----------
    codes : array ``[sets, vectors]``, integer
    codebook : array ``[sets, codebook_size, dim]``

    Returns
    -------
    array ``[sets, vectors, dim]``, dtype of the codebook
    """
    xp = array_namespace(codes, codebook)
    sets, size, dim = codebook.shape
    offset = xp.arange(sets, dtype=xp.int32, device=device(codes))[:, None] * size
    index = xp.reshape(xp.astype(codes, xp.int32) + offset, (sets * codes.shape[1],))
    taken = xp.take(xp.reshape(codebook, (sets * size, dim)), index, axis=0)
    return xp.reshape(taken, (*codes.shape, dim))


def _take(x: Array, index: np.ndarray) -> Array:
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(index, dtype=xp.int32, device=device(x)), axis=1)


def _blocks(x: Array, codebook_size: int) -> Iterator[slice]:
    """Cut the vectors so that a block's distances take no more room than `x`, or than `_BLOCK`."""
    sets, vectors, dim = x.shape
    room = max(sets * vectors * dim, _BLOCK)
    step = max(1, room // max(1, sets * codebook_size))
    return (slice(i, min(i + step, vectors)) for i in range(0, max(vectors, 1), step))
