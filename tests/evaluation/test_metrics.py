from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from kvcompress.errors import ShapeError
from kvcompress.evaluation.metrics import attention, attention_error, relative_error, relative_mse


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def naive_attention(q, k, v, scale):
    """One query head and one query at a time, with Python's own numbers."""
    num_heads, num_queries, head_dim = q.shape
    num_kv_heads, seq_len, value_dim = v.shape
    output = np.zeros((num_heads, num_queries, value_dim))
    for h in range(num_heads):
        kv = h // (num_heads // num_kv_heads)
        for j in range(num_queries):
            seen = range(seq_len - num_queries + j + 1)
            logits = [
                scale * sum(float(q[h, j, d]) * float(k[kv, t, d]) for d in range(head_dim))
                for t in seen
            ]
            weights = [math.exp(logit) for logit in logits]
            for t in seen:
                output[h, j] += weights[t] / sum(weights) * v[kv, t].astype("float64")
    return output


def test_relative_error_by_hand():
    x = np.array([3.0, 4.0], dtype="float32")
    assert relative_error(x, np.array([3.0, 5.0], dtype="float16")) == 1 / 5
    assert relative_mse(x, np.array([3.0, 5.0], dtype="float16")) == pytest.approx(1 / 25)
    assert relative_error(x, x) == 0


def test_energy_is_about_zero_not_about_the_mean():
    x = np.full((2, 8), 10.0, dtype="float32")
    assert relative_mse(x, x + 1) == pytest.approx(0.01)


def test_relative_error_of_zeros():
    zeros = np.zeros(3, dtype="float32")
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, zeros + 1) == math.inf


def test_relative_error_is_computed_in_float64():
    x = np.full(2**16, 250, dtype="float16")  # the energy overflows float16
    assert relative_error(x, x + np.float16(0.25)) == pytest.approx(1e-3, rel=1e-12)


def test_relative_error_takes_bfloat16():
    x = np.array([2.0, 4.0], dtype=ml_dtypes.bfloat16)
    assert relative_error(x, x * x) == pytest.approx(math.sqrt((2**2 + 12**2) / 20))


def test_relative_error_rejects_other_shapes():
    with pytest.raises(ShapeError, match=r"\(3,\) and \(1,\)"):
        relative_error(np.ones(3), np.ones(1))


@pytest.mark.parametrize(("heads", "queries", "dim"), [(2, 7, 4), (6, 3, 4), (6, 1, 8), (2, 7, 1)])
def test_attention_is_the_naive_one(heads, queries, dim):
    q, k, v = normal(0, heads, queries, dim), normal(1, 2, 7, dim), normal(2, 2, 7, 5)
    expected = naive_attention(q, k, v, dim**-0.5)
    np.testing.assert_allclose(attention(q, k, v), expected, rtol=1e-12)
    np.testing.assert_allclose(
        attention(q, k, v, scale=0.3), naive_attention(q, k, v, 0.3), rtol=1e-12
    )


def test_attention_does_the_same_to_every_batch():
    q, k, v = normal(0, 2, 4, 5, 8), normal(1, 2, 2, 9, 8), normal(2, 2, 2, 9, 8)
    for b in range(2):
        np.testing.assert_array_equal(attention(q, k, v)[b], attention(q[b], k[b], v[b]))


def test_attention_does_not_depend_on_its_blocks(monkeypatch):
    q, k, v = normal(0, 4, 9, 8), normal(1, 2, 20, 8), normal(2, 2, 20, 8)
    whole = attention(q, k, v)
    monkeypatch.setattr("kvcompress.evaluation.metrics._BLOCK", 2 * 4 * 20)
    np.testing.assert_allclose(attention(q, k, v), whole, rtol=1e-12)


def test_attention_survives_large_logits():
    k = np.zeros((1, 2, 1), dtype="float32")
    k[0, 1] = 1
    v = np.array([[[1.0], [5.0]]], dtype="float32")
    assert attention(np.full((1, 1, 1), 1e6, dtype="float32"), k, v) == pytest.approx(5)


def test_attention_does_not_see_the_future():
    q, k, v = normal(0, 2, 4, 8), normal(1, 2, 6, 8), normal(2, 2, 6, 8)
    before = attention(q, k, v)
    k[:, -1], v[:, -1] = 100, np.nan
    past = attention(q[:, :-1], k[:, :-1], v[:, :-1])
    np.testing.assert_allclose(past, before[:, :-1], rtol=1e-12)
    assert np.isnan(attention(q, k, v)[:, -1]).all()


def test_attention_error_does_not_see_what_softmax_does_not():
    q, k, v = normal(0, 4, 3, 8), normal(1, 2, 20, 8), normal(2, 2, 20, 8)
    offset = normal(3, 1, 1, 8).astype("float64")  # the same for all tokens: all logits move alike
    assert attention_error(q, (k, v), (k + offset, v)) < 1e-12
    assert attention_error(q, (k, v), (k, v * 1.5)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((4, 8), (2, 9, 8), (2, 9, 8), "expected q"),
        ((2, 4, 8), (2, 9, 8), (2, 8, 8), "agree in all sizes but the last"),
        ((3, 4, 8), (2, 9, 8), (2, 9, 8), "multiple"),
        ((2, 4, 7), (2, 9, 8), (2, 9, 8), "head_dim"),
        ((1, 2, 4, 8), (2, 9, 8), (2, 9, 8), "batch"),
        ((2, 10, 8), (2, 9, 8), (2, 9, 8), "last tokens"),
    ],
)
def test_attention_rejects_what_does_not_fit(q, k, v, message):
    with pytest.raises(ShapeError, match=message):
        attention(np.ones(q), np.ones(k), np.ones(v))
