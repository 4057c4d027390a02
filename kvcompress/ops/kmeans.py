"""Vector quantization: a k-means codebook, nearest codes, and their lookup.

Lloyd's algorithm on a random sample, as in product quantization (Jegou et al. 2011,
doi 10.1109/TPAMI.2010.57).
"""

from __future__ import annotations

import numpy as np

from kvcompress.arrays import Array, array_namespace, device, first_largest, look_up, map_blocks

SAMPLES_PER_CODE = 64
"""Vectors at most that train one centroid."""

DISTANCES = 2**20
"""Distances held at a time."""


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
    samples = min(vectors, SAMPLES_PER_CODE * codebook_size)
    x = _rows(x, np.random.default_rng(seed).choice(vectors, samples, replace=False))
    codebook = _rows(x, np.arange(codebook_size) % x.shape[0])
    codes = xp.arange(codebook_size, dtype=xp.int32, device=device(x))
    for _ in range(iterations):
        # Sorted by code, the vectors of a centroid are a run, and its sum a difference of sums.
        nearest_codes = nearest(x, codebook)
        order = xp.argsort(nearest_codes)
        sums = xp.cumulative_sum(xp.take(x, order, axis=0), axis=0, include_initial=True)
        nearest_codes = xp.take(nearest_codes, order)
        start = xp.searchsorted(nearest_codes, codes)
        stop = xp.searchsorted(nearest_codes, codes, side="right")
        members = xp.astype(stop - start, xp.float32)[:, None]
        total = xp.take(sums, stop, axis=0) - xp.take(sums, start, axis=0)
        # A centroid that lost all its vectors stays where it was.
        codebook = xp.where(members > 0, total / xp.where(members > 0, members, 1.0), codebook)
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

    def block(rows: Array) -> Array:
        return first_largest(rows @ codebook.T - half_norm)

    return map_blocks(block, max(1, DISTANCES // codebook.shape[0]), x)


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
    return look_up(codebook, xp.astype(codes, xp.int32, copy=False))


def _rows(x: Array, index: np.ndarray) -> Array:
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(index, dtype=xp.int32, device=device(x)), axis=0)
