from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.ops import within

LIMIT = 2.0


def typed(x, dtype):
    return x.astype("float32").astype(np.dtype(dtype) if dtype != "bfloat16" else _bfloat16())


def _bfloat16():
    return pytest.importorskip("ml_dtypes").bfloat16


@given(data=st.data())
def test_one_value_beyond_the_limit_is_found(xp, data):
    """Wherever it is, and among few values or many, which libraries reduce in other ways."""
    shape = data.draw(st.sampled_from([(1, 1, 1), (3, 5, 7), (2, 70, 128), (1, 1, 5000)]), "shape")
    dtype = data.draw(st.sampled_from(xp.dtypes), "dtype")
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    x = np.random.default_rng(0).uniform(-LIMIT, LIMIT, shape)
    x[at] = data.draw(st.sampled_from([LIMIT, -LIMIT]), "largest")
    assert bool(xp.numpy(xp.run(within, xp.asarray(typed(x, dtype)), limit=LIMIT)))
    x[at] = data.draw(st.sampled_from([2.1, -2.1, np.inf, -np.inf, np.nan]), "beyond")
    found = xp.run(within, xp.asarray(typed(x, dtype)), limit=LIMIT)
    assert found.shape == ()
    assert not bool(xp.numpy(found))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_nothing_is_within_every_limit(xp, shape):
    assert bool(xp.numpy(xp.run(within, xp.asarray(np.zeros(shape, "float32")), limit=0.0)))
