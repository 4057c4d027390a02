from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.ops import AffineSpec, clip_groups
from kvcompress.ops.clipping import CUTS, _least_sum, errors


def cost(code, bits, cuts):
    """Squared error of a value of 8 bits, in 2**-16 of its group's range squared."""
    start, stop = cuts[0] / 16, 1 - cuts[1] / 16
    step = (stop - start) / (2**bits - 1)
    nearest = min(max(round((code / 255 - start) / step), 0), 2**bits - 1)
    return round((code / 255 - start - nearest * step) ** 2 * 2**16)


def clipped(values, bits):
    """One group: all ways to cut it, scalar by scalar."""
    low, high = (np.float32(f(values)) for f in (min, max))
    if high - low < oracle.TINY:
        return [min(max(v, low), high) for v in values]
    scale = np.float32(255) / (high - low)
    codes = [int(min(max(np.rint((np.float32(v) - low) * scale), 0), 255)) for v in values]
    pairs = itertools.product(range(4), range(4))
    first, last = min(pairs, key=lambda cuts: sum(cost(c, bits, cuts) for c in codes))
    sixteenth = (high - low) / np.float32(16)
    for _ in range(first):
        low = low + sixteenth
    for _ in range(last):
        high = high - sixteenth
    return [min(max(np.float32(v), low), high) for v in values]


@given(data=st.data())
def test_the_best_of_all_cuts(xp, data):
    tokens, channels = (data.draw(st.integers(1, 40), name) for name in ("tokens", "channels"))
    spec = AffineSpec(
        data.draw(st.sampled_from([2, 3]), "bits"),
        data.draw(st.sampled_from([4, 32]), "group"),
        data.draw(st.sampled_from(["channel", "token"]), "axis"),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    # Heavy tails, which are worth cutting, and ties.
    x = np.round(rng.standard_t(2, (1, tokens, channels)), 1).astype("float32")
    expected = np.empty_like(x)
    for members in oracle.groups(tokens, channels, spec.group_size, spec.axis).values():
        rows, columns = zip(*members, strict=True)
        expected[0, rows, columns] = clipped(list(x[0, rows, columns]), spec.bits)
    y = xp.run(clip_groups, xp.asarray(x), spec=spec)
    assert xp.owns(y)
    np.testing.assert_array_equal(xp.numpy(y), expected)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_more_groups_than_are_looked_at_together(xp, axis, monkeypatch):
    x = np.random.default_rng(0).standard_t(3, (2, 70, 24)).astype("float32")
    spec = AffineSpec(2, 8, axis)
    whole = clip_groups(x, spec=spec)
    monkeypatch.setattr("kvcompress.ops.clipping.ERRORS", 16 * 8 * 24 * 5)
    parts = xp.numpy(xp.run(clip_groups, xp.asarray(x), spec=spec))
    np.testing.assert_array_equal(parts, whole)
    assert math.prod(x.shape) * 16 > 16 * 8 * 24 * 5


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_nothing(xp, shape):
    y = xp.run(clip_groups, xp.asarray(np.zeros(shape, "float32")), spec=AffineSpec(2, 32, "token"))
    assert y.shape == shape


@given(data=st.data())
def test_groups_too_long_for_sums_of_32_bits(xp, data):
    """Parts are added up exactly: the choice is that of sums without limits."""
    axis = data.draw(st.sampled_from(["channel", "token"]), "axis")
    n, size = data.draw(st.sampled_from([(1, 5), (60, 9), (60, 40), (59, 16)]), "n, size")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    x = np.round(rng.standard_t(2, (2, n, 3)), 1).astype("float32")
    x = x if axis == "channel" else np.ascontiguousarray(np.swapaxes(x, 1, 2))
    spec = AffineSpec(data.draw(st.sampled_from([1, 2]), "bits"), size, axis)
    expected = clip_groups(x, spec=spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvcompress.ops.clipping.LONGEST", 4)
        y = clip_groups(xp.asarray(x), spec=spec)
    np.testing.assert_array_equal(xp.numpy(y), expected)


def test_sums_beyond_32_bits_are_compared_exactly(xp):
    parts = np.random.default_rng(0).integers(0, 2**30, (2, 2**10, 3, 16)).astype("int32")
    parts[1, :, 0] = parts[1, :, 0, :1]  # a tie: the first wins
    parts[1, 5, 1, 3:] = parts[1, 5, 1, :1]
    parts[0, :, 2] = 2**30 - 1
    parts[0, -1, 2, 7:9] = 2**30 - 2
    exact = parts.sum(axis=1, dtype="int64")
    assert exact.min() > 2**31
    found = xp.numpy(_least_sum(xp.asarray(parts)))
    np.testing.assert_array_equal(found, exact.argmin(axis=-1))


@pytest.mark.parametrize(("bits", "n"), [(1, 2**18), (2, 2**21), (2, 2**22 - 5)])
def test_groups_of_millions_of_values(xp, bits, n):
    """Sums of errors beyond 2**31, and the range that 64 bits choose."""
    most = (14, 15) if bits == 1 else (-1, 1)  # of which one value has a large error, or all
    x = np.random.default_rng(0).choice(most, (1, n, 1)).astype("float32")
    x[0, :4, 0] = [-1, 30, 30, 30]
    codes = np.rint((x.reshape(-1) + 1) * np.float32(255 / 31)).astype("uint8")
    sums = errors(bits) @ np.bincount(codes, minlength=256)
    assert sums.max() > 2**31
    low, high = divmod(int(np.argmin(sums)), len(CUTS))
    y = xp.numpy(clip_groups(xp.asarray(x), spec=AffineSpec(bits, n, "channel")))
    assert (y.min(), y.max()) == (-1 + low * 31 / 16, 30 - high * 31 / 16)
