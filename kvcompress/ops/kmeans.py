"""Vector quantization: a k-means codebook, nearest codes, and their lookup.

Lloyd's algorithm on a random sample, as in product quantization (Jegou et al. 2011,
doi 10.1109/TPAMI.2010.57).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcompress._namespace import Array, array_namespace, device

SAMPLES_PER_CODE = 64
"""Vectors that train one centroid; more hardly move it."""

_BLOCK = 2**22
"""Distances held at a time, unless the input itself is larger."""


def kmeans(x: Array, codebook_size: int, *, iterations: int, seed: int) -> Array:
    """Train a codebook.

    Parameters
    ----------
    x : array ``[vectors, dim]``, float32
    codebook_size : int
    iterations : int
        Rounds of Lloyd's algorithm.
    seed : int
        Chooses the training sample and the first centroids.

    Returns
    -------
    array ``[codebook_size, dim]``, float32
        Zeros if there are no vectors.
    """
    xp = array_namespace(x)
    vectors, dim = x.shape
    if vectors == 0:
        return xp.zeros((codebook_size, dim), dtype=xp.float32, device=device(x))
    order = np.random.default_rng(seed).permutation(vectors)
    x = _rows(x, order[: SAMPLES_PER_CODE * codebook_size])
    codebook = _rows(x, np.arange(codebook_size) % x.shape[0])
    codes = xp.arange(codebook_size, dtype=xp.int32, device=device(x))[:, None]
    for _ in range(iterations):
        sums = xp.zeros_like(codebook)
        counts = xp.zeros_like(codebook[:, :1])
        for block in _blocks(x, codebook_size):
            member = xp.astype(nearest(x[block, :], codebook) == codes, xp.float32)
            sums = sums + member @ x[block, :]
            counts = counts + xp.sum(member, axis=-1, keepdims=True)
        # A centroid that lost all its vectors stays where it was.
        codebook = xp.where(counts > 0, sums / xp.where(counts > 0, counts, 1.0), codebook)
    return codebook


def nearest(x: Array, codebook: Array) -> Array:
    """Index of the centroid nearest to every vector, the first of equals.

    Parameters
    ----------
    x : array ``[vectors, dim]``, float32
    codebook : array ``[codebook_size, dim]``, float32

    Returns
    -------
    array ``[vectors]``, int32
    """
    xp = array_namespace(x, codebook)
    half_norm = xp.sum(codebook * codebook, axis=-1) / 2
    codes = [
        xp.astype(xp.argmin(half_norm - x[block, :] @ codebook.T, axis=-1), xp.int32)
        for block in _blocks(x, codebook.shape[0])
    ]
    return codes[0] if len(codes) == 1 else xp.concat(codes)


def lookup(codes: Array, codebook: Array) -> Array:
    """Centroids that the codes stand for.

    Parameters
    ----------
    codes : array ``[vectors]``, integer
    codebook : array ``[codebook_size, dim]``

    Returns
    -------
    array ``[vectors, dim]``, dtype of the codebook
    """
    xp = array_namespace(codes, codebook)
    return xp.take(codebook, xp.astype(codes, xp.int32, copy=False), axis=0)


def _rows(x: Array, index: np.ndarray) -> Array:
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(index, dtype=xp.int32, device=device(x)), axis=0)


def _blocks(x: Array, codebook_size: int) -> Iterator[slice]:
    """Cut the vectors so that a block's distances take no more room than `x`, or than `_BLOCK`."""
    vectors, dim = x.shape
    step = max(1, max(vectors * dim, _BLOCK) // codebook_size)
    return (slice(i, min(i + step, vectors)) for i in range(0, max(vectors, 1), step))
