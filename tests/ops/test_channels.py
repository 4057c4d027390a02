"""Offsets and scales of channels: against an oracle in whole numbers, and undone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.ops import channel_reference, normalize_channels, restore_channels
from kvcompress.ops.channels import POWER, SAMPLE, factors
from kvcompress.testing import strategies

TINY = 2.0**-100


def reference(x):
    """In float64 and Python's integers, one channel after the other."""
    heads, tokens, channels = x.shape
    offset, scale = np.zeros((heads, 1, channels), x.dtype), np.zeros((heads, 1, channels), "uint8")
    sample = x[:, :: max(1, tokens // SAMPLE)].astype("float64")
    for head, channel in np.ndindex(heads, channels):
        peak = float(np.max(np.abs(x[head, :, channel]).astype("float64"), initial=0.0))
        if peak < TINY:
            continue
        values = sample[head, :, channel]
        centre = np.mean(values)
        offset[head, 0, channel] = centre if abs(centre) >= TINY else 0
        spread = np.mean(np.abs(values - float(offset[head, 0, channel])))
        spread = max(spread, peak * 2.0**-24)
        if spread >= TINY:
            scale[head, 0, channel] = np.clip(np.floor(np.log2(spread) + 128.5), 1, 255)
    return offset, scale


@given(strategies.kv(strategies.kv_shapes(ndim=3), dtypes=("float32", "float16")))
def test_against_the_oracle(xp, kv):
    x, _ = kv
    if x.dtype.name not in xp.dtypes:
        x = x.astype("float32")
    offset, scale = (xp.numpy(a) for a in xp.run(channel_reference, xp.asarray(x)))
    expected, octave = reference(x)
    assert (offset.shape, offset.dtype) == (expected.shape, x.dtype)
    peak = np.max(np.abs(x.astype("float64")), axis=1, keepdims=True, initial=0.0)
    # Whole numbers of a 2**20th of the peak, a few roundings, and the dtype's own.
    unit = 2.0**-18 if x.dtype == "float32" else 2.0**-10
    error = np.abs(offset.astype("float64") - expected.astype("float64"))
    assert np.all(error <= unit * peak + 2.0**-24)
    assert np.all(np.abs(scale.astype(int) - octave) <= (octave > 0) + (scale > 0))


def test_the_same_bits_everywhere(xp):
    rng = np.random.default_rng(0)
    for tokens in (1, 7, 300, 2000):
        x = rng.standard_normal((2, tokens, 16)) * np.exp2(rng.integers(-30, 9, 16))
        x = (x + rng.standard_normal(16) * 50).astype("float32")
        expected = channel_reference(x)
        found = xp.run(channel_reference, xp.asarray(x))
        for a, b in zip(found, expected, strict=True):
            assert xp.numpy(a).tobytes() == b.tobytes()
        normal = xp.run(normalize_channels, xp.asarray(x), *found)
        assert xp.numpy(normal).tobytes() == normalize_channels(x, *expected).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_undone(xp, dtype):
    if dtype not in xp.dtypes:
        pytest.skip(f"{xp} has no {dtype}")
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2, 40, 8)) * [1, 1e-3, 0, 100, 1, 1, 5, 1]).astype(dtype)
    array = xp.asarray(x)
    found = xp.run(channel_reference, array)
    normal = xp.run(normalize_channels, array, *found)
    back = xp.numpy(xp.run(restore_channels, normal, *found, dtype=dtype))
    assert back.dtype == x.dtype
    np.testing.assert_allclose(back, x, rtol=1e-5 if dtype == "float32" else 2e-3, atol=1e-6)


@given(st.integers(1, 255))
def test_scales_are_powers_of_the_spread(octave):
    assert factors()[octave] == pytest.approx(2.0 ** (POWER * (octave - 128)), rel=1e-6)
    assert factors()[0] == 1


def test_the_largest_numbers_stay_finite():
    x = np.zeros((1, 3000, 4), "float32")
    x[0, 1, 0], x[0, ::2, 1], x[0, 1, 2] = 2.0**120, -(2.0**120), 2.0**-126
    x[0, :, 3] = 2.0**-99
    found = channel_reference(x)
    normal = normalize_channels(x, *found)
    assert np.all(np.isfinite(normal))
    assert np.all(np.abs(normal) <= 2.0**126)
    large = np.full_like(x, 2.0**126)
    assert np.all(np.isfinite(restore_channels(large, *found, dtype="float32")))
