"""Vector quantization: a k-means codebook, nearest codes, and their lookup.

Lloyd's algorithm on a random sample, as in product quantization (Jegou et al. 2011,
doi 10.1109/TPAMI.2010.57).
"""

from __future__ import annotations

import math
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
from kvcompress.ops.registry import Nearest, operation

SAMPLES_PER_CODE = 64
"""Vectors at most that train one centroid."""

NUMBERED = 2**31 - 1
"""Vectors that int32 can number: the sample is drawn from these, the first."""

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
    vectors = min(vectors, NUMBERED)
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


def _nearest_examples(inputs: Inputs) -> Iterator[Call]:
    heads, tokens, channels = inputs.shape
    for dim in inputs.choose(every=(channels,), usual=(math.gcd(4, channels),)):
        x = inputs.tensor((heads * tokens * channels // dim, dim), extreme=False)
        for size in inputs.choose(every=(2, 3, 256), usual=(256,)):
            yield Call((x, inputs.codebook((size, dim))), label=f"{size} codes of {dim} values")


def excess(x: HostArray, codebook: HostArray, codes: HostArray) -> tuple[HostArray, HostArray]:
    """How much farther than the nearest a centroid is, and how much farther rounding may take it.

    Both sides minimize ``|c|**2 / 2 - <x, c>`` in float32, each within ``gamma(dim + 2)`` of the
    sum of magnitudes. The second centroid equals the first: to take it is infinitely bad.
    """
    x, codebook = x.astype("float64"), codebook.astype("float64")
    half_norm = (codebook**2).sum(-1) / 2
    score = half_norm - x @ codebook.T
    worse = np.take_along_axis(score, codes[:, None].astype("int64"), -1)[:, 0] - score.min(-1)
    size = (abs(x) @ abs(codebook).T + half_norm).max(-1)
    bound = 2 * (x.shape[-1] + 2) * 2.0**-24 * size + 2.0**-126
    return np.where(codes == 1, np.inf, worse), bound


def _excess(call: Call, codes: HostArray) -> tuple[HostArray, HostArray]:
    x, codebook = call.arrays
    return excess(x, codebook, codes)


@operation(_nearest_examples, Nearest(_excess), dtypes=("float32",))
def nearest(x: Array, codebook: Array) -> Array:
    """Find the centroid nearest to every vector, the first of equals.

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


def _lookup_examples(inputs: Inputs) -> Iterator[Call]:
    for call in _nearest_examples(inputs):
        x, codebook = call.arrays
        codes = inputs.integers(x.shape[:1], codebook.shape[0], "int32")
        yield Call((codes, codebook), label=call.label, source=x)


@operation(_lookup_examples, dtypes=("float32",))
def lookup(codes: Array, codebook: Array) -> Array:
    """Look up the centroids that the codes stand for.

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
