"""Codebooks of transform coding: k-means on the host, over all heads of a layer."""

from __future__ import annotations

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.ops.product import CODES

ITERATIONS = 12
"""Rounds of Lloyd's algorithm."""

_ROWS = 4096
"""Rows whose distances are held at a time: they stay in the cache."""


def train_codebooks(x: HostArray) -> HostArray:
    """Train 256 centroids for every head.

    Parameters
    ----------
    x : array ``[heads, rows, dim]``, float32
        At least 256 rows.

    Returns
    -------
    array ``[heads, 256, dim]``, float32
    """
    train = _scalar if x.shape[-1] == 1 else _vector
    return np.stack([train(np.ascontiguousarray(rows)) for rows in x]).astype(np.float32)


def _vector(x: HostArray) -> HostArray:
    """Lloyd's algorithm, from rows drawn at random."""
    book = x[np.random.default_rng(0).permutation(len(x))[:CODES]]
    # One more channel, so that the product with a centroid c is <x, c> - |c|^2 / 2.
    extended = np.concatenate([x, -np.ones((len(x), 1), dtype=np.float32)], axis=-1)
    for _ in range(ITERATIONS):
        table = np.concatenate([book, np.sum(book * book, axis=-1, keepdims=True) / 2], axis=-1).T
        blocks = (extended[i : i + _ROWS] for i in range(0, len(x), _ROWS))
        codes = np.concatenate([np.argmax(rows @ table, axis=-1) for rows in blocks])
        members = np.bincount(codes, minlength=CODES)[:, None]
        total = np.stack([np.bincount(codes, column, CODES) for column in x.T], axis=-1)
        # A centroid that lost all its rows stays where it was.
        mean = np.asarray(total / np.maximum(members, 1), dtype=np.float32)
        book = np.where(members > 0, mean, book)
    return book


def _scalar(x: HostArray) -> HostArray:
    """Lloyd's algorithm for numbers: sorted, those of a level are a run.

    Starts with levels as dense as the cube root of the density, which is best for many levels
    (Panter and Dite 1951, doi 10.1109/JRPROC.1951.230419).
    """
    x = np.sort(x[:, 0].astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(x)])
    knots = x[np.linspace(0, len(x) - 1, min(len(x), 2048)).astype(int)]
    density = np.concatenate([[0.0], np.cumsum(np.diff(knots) ** (2 / 3))])
    levels = np.interp((np.arange(CODES) + 0.5) / CODES * density[-1], density, knots)
    for _ in range(ITERATIONS):
        ends = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(x)]])
        members = np.diff(ends)
        levels = np.where(members > 0, np.diff(sums[ends]) / np.maximum(members, 1), levels)
    column: HostArray = levels[:, None]
    return column
