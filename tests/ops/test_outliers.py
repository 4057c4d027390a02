from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.ops import gather_rows, largest, put_rows
from kvcompress.ops.outliers import _heads_that_fit


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_largest(xp, count):
    score = np.random.default_rng(0).permutation(27).reshape(3, 9).astype("float32")
    index = xp.run(largest, xp.asarray(score), count=count)
    assert xp.owns(index)
    expected = np.array([sorted(sorted(range(9), key=lambda i: -row[i])[:count]) for row in score])
    np.testing.assert_array_equal(xp.numpy(index), expected.reshape(3, count))
    assert xp.numpy(index).dtype == np.int32


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_largest_with_ties(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    (index,) = largest(np.array([scores], "float32"), count)
    assert list(index) == sorted(set(index.tolist()))
    assert sorted(scores[i] for i in index) == sorted(scores)[len(scores) - count :]


@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_gather_and_put(xp, rest, count):
    rng = np.random.default_rng(count)
    x = rng.standard_normal((2, 5, *rest)).astype("float32")
    index = np.sort(np.argsort(rng.random((2, 5)))[:, :count]).astype("int32")
    rows = rng.standard_normal((2, count, *rest)).astype("float32")
    array, indices = xp.asarray(x), xp.asarray(index)
    taken = xp.run(gather_rows, array, indices)
    changed = xp.run(put_rows, array, indices, xp.asarray(rows))
    expected = x.copy()
    for h in range(2):
        for j, i in enumerate(index[h]):
            np.testing.assert_array_equal(xp.numpy(taken)[h, j], x[h, i])
            expected[h, i] = rows[h, j]
    assert taken.shape == (2, count, *rest)
    np.testing.assert_array_equal(xp.numpy(changed), expected, strict=True)
    np.testing.assert_array_equal(xp.numpy(array), x)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(xp, shape):
    x = xp.asarray(np.zeros(shape, "float32"))
    index = xp.run(largest, x, count=0)
    assert index.shape == (shape[0], 0)
    assert xp.run(gather_rows, x, index).shape == (shape[0], 0)
    assert xp.run(put_rows, x, index, xp.run(gather_rows, x, index)).shape == shape


def test_more_rows_than_the_default_integer_can_number(xp, monkeypatch):
    """Of JAX, that is int32: heads are taken a few at a time."""
    monkeypatch.setattr("kvcompress.ops.outliers._heads_that_fit", lambda *_: 2)
    rng = np.random.default_rng(0)
    x, values = rng.standard_normal((5, 9, 2)), rng.standard_normal((5, 3, 2))
    x, values = x.astype("float32"), values.astype("float32")
    index = np.sort(np.argsort(rng.random((5, 9)))[:, :3]).astype("int32")
    expected = x.copy()
    np.put_along_axis(expected, index[..., None], values, axis=1)
    y = put_rows(*map(xp.asarray, (x, index, values)))
    np.testing.assert_array_equal(xp.numpy(y), expected)
    taken = gather_rows(y, xp.asarray(index))
    np.testing.assert_array_equal(xp.numpy(taken), values)


def test_how_many_heads_can_be_numbered_together(xp):
    index = xp.asarray(np.zeros((1, 1), "int32"))
    wide = xp.numpy(xp.module.arange(1)).dtype == np.int64
    assert _heads_that_fit(index, 2**30) == (2**33 - 1 if wide else 1)
    assert _heads_that_fit(index, 0) > 0
