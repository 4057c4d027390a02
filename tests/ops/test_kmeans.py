from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import oracle
import pytest

from kvcompress.arrays import map_blocks
from kvcompress.ops import kmeans, lookup, nearest

VECTORS, DIM = 90, 4
MODULE = sys.modules["kvcompress.ops.kmeans"]


def vectors(seed=0, shape=(VECTORS, DIM)):
    """Three clusters, so that there is something to find."""
    rng = np.random.default_rng(seed)
    centers = 5 * rng.standard_normal((3, shape[1]))
    x = centers[rng.integers(0, 3, shape[0])]
    return (x + rng.standard_normal(shape)).astype("float32")


def score_error(x, codebook):
    """How much worse than the best a float32 choice may be, in squared distance.

    ``|c|^2 - 2 x.c`` is two sums of `dim` products and a difference, for the best and the chosen.
    """
    size = 2 * abs(x) @ abs(codebook).T + (codebook.astype("float64") ** 2).sum(-1)
    return 2 * oracle.gamma(x.shape[1] + 2) * size.max(-1)


def train(xp, x, size, iterations, seed=0):
    out = xp.run(kmeans, xp.asarray(x), codebook_size=size, iterations=iterations, seed=seed)
    assert xp.owns(out)
    return xp.numpy(out)


def distortion(x, codebook):
    return oracle.distances(x, codebook).min(1).sum()


@pytest.mark.parametrize("size", [2, 7])
def test_nearest_is_nearest(xp, size):
    x, codebook = vectors(), vectors()[:size] + np.float32(0.1)
    codes = xp.run(nearest, xp.asarray(x), xp.asarray(codebook))
    assert xp.owns(codes)
    codes = xp.numpy(codes)
    assert codes.dtype == np.int32
    assert codes.shape == (VECTORS,)
    d = oracle.distances(x, codebook)
    chosen = d[np.arange(VECTORS), codes]
    assert (chosen - d.min(1) <= score_error(x, codebook)).all()
    assert len(set(codes)) > 1


def test_nearest_takes_the_first_of_equals(xp):
    codebook = np.array([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], "float32")
    x = np.array([[2.0, 1], [-2, 1], [0, 1], [0, 0]], "float32")
    codes = xp.run(nearest, xp.asarray(x), xp.asarray(codebook))
    assert xp.numpy(codes).tolist() == [0, 1, 0, 0]


def test_lookup(xp):
    codebook = vectors(1, (5, DIM))
    codes = np.random.default_rng(0).integers(0, 5, 11).astype("int32")
    for kind in ("int32", "uint8"):
        found = xp.run(lookup, xp.asarray(codes.astype(kind)), xp.asarray(codebook))
        assert xp.owns(found)
        expected = np.array([codebook[c] for c in codes])
        np.testing.assert_array_equal(xp.numpy(found), expected, strict=True)


def test_coding_the_centroids_again_changes_nothing(xp):
    codebook = xp.asarray(vectors(1, (5, DIM)))
    codes = xp.run(nearest, xp.asarray(vectors()), codebook)
    back = xp.run(lookup, codes, codebook)
    again = xp.run(nearest, back, codebook)
    np.testing.assert_array_equal(xp.numpy(again), xp.numpy(codes))


def test_first_centroids_are_vectors_chosen_by_the_seed(xp):
    x = vectors()
    books = [train(xp, x, 6, 0, seed) for seed in (0, 0, 1)]
    rows = {tuple(v) for v in x}
    for book in books:
        assert book.shape == (6, DIM)
        assert all(tuple(c) in rows for c in book)
        assert len({tuple(c) for c in book}) == 6
    np.testing.assert_array_equal(books[0], books[1])
    assert (books[0] != books[2]).any()


def test_one_round_is_lloyds(xp):
    x = vectors()
    first, second = train(xp, x, 3, 0), train(xp, x, 3, 1)
    # A difference of two sums of up to all vectors, over the members.
    members = np.bincount(oracle.distances(x, first).argmin(1), minlength=3)
    bound = 2 * oracle.gamma(VECTORS + 2) * abs(x).sum(0) / members[:, None]
    assert (abs(second - oracle.lloyd(x, first)) <= bound).all()


def test_training_never_makes_it_worse(xp):
    x = vectors()
    errors = [distortion(x, train(xp, x, 8, n)) for n in (0, 1, 2, 6)]
    slack = oracle.gamma(4 * VECTORS) * (x.astype("float64") ** 2).sum()
    assert all(b <= a + slack for a, b in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]  # there are clusters to be found


def test_deterministic(xp):
    x = vectors()
    np.testing.assert_array_equal(train(xp, x, 8, 3), train(xp, x, 8, 3), strict=True)


def test_a_centroid_without_vectors_stays(xp):
    x = np.array([[0.0], [0.0], [0.0], [9.0]], "float32")
    assert sorted(train(xp, x, 4, 3).ravel().tolist()) == [0.0, 0.0, 0.0, 9.0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_vectors_than_centroids(xp, count):
    x = vectors(shape=(3, DIM))[:count]
    book = train(xp, x, 5, 2)
    assert book.shape == (5, DIM)
    if count:
        assert distortion(x, book) <= oracle.gamma(8) * (x.astype("float64") ** 2).sum()
    else:
        assert not book.any()
    codes = xp.run(nearest, xp.asarray(x), xp.asarray(book))
    assert codes.shape == (count,)


@pytest.mark.parametrize("rows", [1, 7, 45, 89, 90, 91])
def test_blocks_give_the_same(xp, rows):
    """A distance matrix too large for one block is worked off in several."""
    x = vectors()
    seen = []

    def function(block):
        seen.append(block.shape[0])
        return block[:, 0] * 2

    out = map_blocks(function, rows, xp.asarray(x))
    np.testing.assert_array_equal(xp.numpy(out), x[:, 0] * 2, strict=True)
    assert max(seen) <= rows
    assert xp.is_jax or sum(seen) == VECTORS
    # Several arrays, either way.
    halves = map_blocks(lambda a, b: (a[:, :2] - b, b), rows, xp.asarray(x), out[:, None])
    np.testing.assert_array_equal(xp.numpy(halves[0]), x[:, :2] - x[:, :1] * 2, strict=True)
    np.testing.assert_array_equal(xp.numpy(halves[1]), x[:, :1] * 2, strict=True)


@pytest.mark.parametrize("distances", [1, 42, 300])
def test_nearest_and_kmeans_in_blocks(monkeypatch, distances):
    x, codebook = vectors(), vectors(1, (6, DIM))
    codes, book = nearest(x, codebook), kmeans(x, 6, iterations=2, seed=0)
    monkeypatch.setattr(MODULE, "DISTANCES", distances)
    np.testing.assert_array_equal(nearest(x, codebook), codes)
    np.testing.assert_array_equal(kmeans(x, 6, iterations=2, seed=0), book)


def test_more_vectors_than_can_be_numbered(xp, monkeypatch):
    """The sample is drawn from the first of them."""
    x = vectors()
    expected = train(xp, x[:50], 8, 3)
    monkeypatch.setattr(MODULE, "NUMBERED", 50)
    found = xp.numpy(kmeans(xp.asarray(x), 8, iterations=3, seed=0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
