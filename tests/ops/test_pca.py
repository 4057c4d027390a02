from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import oracle
import pytest

from kvcompress.ops import center, principal_components, reconstruct, variances

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
HEADS, TOKENS, CHANNELS = 3, 50, 8
UNIT = oracle.UNIT["float32"]


def tensor(dtype, seed=0, shape=(HEADS, TOKENS, CHANNELS), decay=0.6):
    """Heads of different scales, means and falling spectra."""
    rng = np.random.default_rng(seed)
    heads, _, channels = shape
    mix = rng.standard_normal((heads, channels, channels))
    x = rng.standard_normal(shape) * decay ** np.arange(channels) @ mix + rng.standard_normal(
        (heads, 1, channels)
    )
    return (x * 3.0 ** np.arange(heads)[:, None, None]).astype(DTYPES[dtype])


def covariance_error(scaled, dtype):
    """How far float32 may move the covariance of data scaled to 1, in the spectral norm.

    The product sums one term a token; `scaled` and the mean are rounded first; ``eigh`` is
    backward stable (Golub and Van Loan, section 8.3), here within a modest multiple of channels.
    """
    tokens, channels = scaled.shape
    trace = float(oracle.spectrum(scaled).sum())
    mean = channels * (oracle.UNIT[dtype] + oracle.gamma(tokens)) ** 2
    moved = 2 * oracle.gamma(4) * math.sqrt(channels * (trace + mean))
    return oracle.gamma(tokens + 10 * channels) * (trace + mean) + moved + mean


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


def require(xp, dtype):
    if dtype not in xp.dtypes:
        pytest.skip(f"{xp} has no {dtype}")


def test_center(xp, dtype):
    require(xp, dtype)
    x = tensor(dtype)
    centered, mean, scale = (xp.numpy(a) for a in xp.run(center, xp.asarray(x)))
    assert [a.dtype.name for a in (centered, mean, scale)] == ["float32", dtype, "float32"]
    wide = x.astype("float64")
    np.testing.assert_array_equal(scale[:, 0, 0], abs(wide).max((1, 2)))
    scaled = wide / scale
    off = oracle.UNIT[dtype] + oracle.gamma(TOKENS + 2)
    assert (abs(mean.astype("float64") - scaled.mean(1, keepdims=True)) <= off).all()
    # Two roundings of numbers up to 1 and 2.
    assert (abs(centered - (scaled - mean.astype("float64"))) <= 3 * UNIT).all()


def test_variances_are_the_oracles(xp, dtype):
    require(xp, dtype)
    x = tensor(dtype)
    found = xp.numpy(xp.run(variances, xp.asarray(x)))
    assert found.dtype == np.float32
    for head in range(HEADS):
        wide = x[head].astype("float64")
        scaled = wide / abs(wide).max()
        bound = covariance_error(scaled, dtype)
        assert (abs(found[head] - oracle.spectrum(scaled)) <= bound).all()


@pytest.mark.parametrize("rank", [1, 3, CHANNELS])
def test_the_error_is_the_discarded_eigenvalues(xp, dtype, rank):
    require(xp, dtype)
    x = tensor(dtype, seed=rank)
    unit, small = oracle.UNIT[dtype], oracle.SMALLEST[dtype]
    principal, coefficients = xp.run(principal_components, xp.asarray(x), rank=rank)
    assert all(map(xp.owns, (*principal, coefficients)))
    basis, mean, scale = (xp.numpy(a).astype("float64") for a in principal)
    stored = [xp.numpy(a).dtype.name for a in (*principal, coefficients)]
    assert stored == [dtype, dtype, "float32", "float32"]
    coefficients = xp.numpy(coefficients).astype("float64")
    for head in range(HEADS):
        b = basis[head]
        # Columns are orthonormal, up to the rounding of their entries.
        off = 2 * unit + unit**2 + 2 * small * math.sqrt(CHANNELS) + oracle.gamma(10 * CHANNELS)
        assert (abs(b.T @ b - np.eye(rank)) <= off).all()
        scaled = x[head].astype("float64") / scale[head]
        error = np.linalg.norm(scaled - (coefficients[head] @ b.T + mean[head]))
        eigenvalues = oracle.spectrum(scaled)
        discarded = TOKENS * eigenvalues[rank:].sum()
        # No affine map of that rank does better (Eckart and Young).
        assert error >= math.sqrt(discarded) * (1 - 1e-9) - 1e-12
        # A basis of a covariance E away captures at most 2 rank E less; all of it, nothing less.
        lost = 0 if rank == CHANNELS else 2 * rank * TOKENS * covariance_error(scaled, dtype)
        size = math.sqrt(TOKENS * eigenvalues.sum())
        moved = unit * math.sqrt(rank) + small * math.sqrt(CHANNELS * rank)
        moved += oracle.gamma(10 * CHANNELS) * math.sqrt(rank)  # as orthonormal as eigh makes it
        rest = size * (2 * moved + moved**2 + oracle.gamma(CHANNELS) * math.sqrt(rank))
        # Mean and centered data are rounded; see `center`.
        rest += math.sqrt(TOKENS * CHANNELS) * (unit + oracle.gamma(TOKENS + 2) + 3 * UNIT)
        assert error <= math.sqrt(discarded + lost) + rest


def test_components_are_ordered_and_nested(xp):
    x = xp.asarray(tensor("float32"))
    _, full = xp.run(principal_components, x, rank=CHANNELS)
    variance = (xp.numpy(full).astype("float64") ** 2).mean(1)
    assert (np.diff(variance, axis=1) <= oracle.gamma(20 * TOKENS) * variance[:, :1]).all()
    principal, part = xp.run(principal_components, x, rank=3)
    assert part.shape == (HEADS, TOKENS, 3)
    assert principal.basis.shape == (HEADS, CHANNELS, 3)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**126, 2.0**-130])
def test_constant_heads(xp, value):
    x = np.full((2, 5, 4), value, "float32")
    principal, coefficients = xp.run(principal_components, xp.asarray(x), rank=2)
    back = xp.numpy(xp.run(reconstruct, principal, coefficients))
    # A sum of five ones, divided by five: exact; denormals count as zero.
    expected = value if value >= 2.0**-100 else 0
    assert (abs(back - expected) <= 2.0**-100).all()
    assert np.isfinite(xp.numpy(principal.basis)).all()


def test_one_token_is_its_own_mean(xp):
    x = tensor("float32", shape=(2, 1, 4))
    principal, coefficients = xp.run(principal_components, xp.asarray(x), rank=1)
    assert not xp.numpy(coefficients).any()
    back = xp.numpy(xp.run(reconstruct, principal, coefficients))
    assert (abs(back - x) <= oracle.gamma(2) * abs(x)).all()


def test_arguments_are_left_alone(xp):
    x = tensor("float32")
    array = xp.asarray(x)
    principal_components(array, 2)
    variances(array)
    np.testing.assert_array_equal(xp.numpy(array), x)
