from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells, levels

BITS = range(1, 9)


def density(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def above(x):
    """Share of a normal source above `x`; a difference of two loses no digits in the tail."""
    return np.array([math.erfc(t / math.sqrt(2)) / 2 for t in x])


def positive_levels(bits):
    """Where every level is the mean of its interval, by Newton's method in float64."""
    n = 2**bits // 2
    wide = NormalDist(0, math.sqrt(3))  # the density of levels, if there were many
    c = np.array([wide.inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)])
    for step in range(20):
        t = np.concatenate([[0.0], (c[1:] + c[:-1]) / 2, [math.inf]])
        share, p = -np.diff(above(t)), density(t)
        mean = -np.diff(p) / share
        # How the mean of an interval moves with its lower and its upper end.
        lower = p[:-1] * (mean - t[:-1]) / share
        upper = np.append(p[1:-1] * (t[1:-1] - mean[:-1]) / share[:-1], 0.0)
        lower[0] = 0.0  # the threshold at zero stays
        slope = np.diag((lower + upper) / 2) + np.diag(lower[1:] / 2, -1)
        slope += np.diag(upper[:-1] / 2, 1)
        move = np.linalg.solve(np.eye(n) - slope, c - mean)
        c = c - (move / 2 if step < 3 else move)
    assert abs(move).max() < 1e-9
    return c


@pytest.mark.parametrize("bits", BITS)
def test_the_committed_levels_are_the_best(bits):
    expected = positive_levels(bits)
    np.testing.assert_array_equal(levels(bits)[2**bits // 2 :] * 4096, np.rint(expected * 4096))
    np.testing.assert_array_equal(levels(bits), -levels(bits)[::-1])


def distortion(codebook, thresholds):
    """Mean squared error of a standard normal source."""
    t = np.concatenate([[-math.inf], thresholds, [math.inf]])
    p, q = density(t), -np.diff(above(t))
    tp = np.concatenate([[0.0], thresholds * p[1:-1], [0.0]])
    square, mean = q - np.diff(tp), -np.diff(p)
    return float(np.sum(square - 2 * codebook * mean + codebook**2 * q))


KNOWN = (0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.44e-4, 1.64e-4, 4.12e-5)
"""Up to 5 bits those of Max 1960, table I."""


@pytest.mark.parametrize("bits", BITS)
def test_the_distortion_is_the_known_one(bits):
    codebook = levels(bits).astype("float64")
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    assert distortion(codebook, midpoints) == pytest.approx(KNOWN[bits - 1], rel=5e-3)
    # What `cells` rounds the thresholds to costs next to nothing.
    table = cells(bits).astype(int)
    rounded = np.flatnonzero(np.diff(table)) + 1.0
    rounded = rounded / CELLS_PER_UNIT - LARGEST
    assert distortion(codebook, rounded) <= 1.003 * distortion(codebook, midpoints)


@pytest.mark.parametrize("bits", BITS)
def test_cells_hold_every_code_in_order(bits):
    table = cells(bits).astype(int)
    assert len(table) == 2 * LARGEST * CELLS_PER_UNIT
    assert sorted(set(table)) == list(range(2**bits))
    assert all(b - a in (0, 1) for a, b in pairwise(table))
    codebook = levels(bits).astype("float64")
    z = (np.arange(len(table)) + 0.5) / CELLS_PER_UNIT - LARGEST
    away = abs(z[:, None] - codebook)
    np.testing.assert_array_equal(away[np.arange(len(z)), table], away.min(1))
