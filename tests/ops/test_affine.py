from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.ops import AffineSpec, clip_groups, dequantize, quantize, unpack
from kvcompress.testing.strategies import tensors

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}

# Pairs of shape and spec, few enough that a compiler meets each of them once: single values, odd
# channels, ragged last groups, groups longer than the tensor, no tokens, no heads.
CASES = [
    ((2, 7, 5), AffineSpec(2, 4, "channel")),
    ((2, 7, 5), AffineSpec(3, 3, "token")),
    ((1, 1, 1), AffineSpec(1, 2, "channel")),
    ((1, 33, 8), AffineSpec(4, 32, "channel")),
    ((2, 9, 16), AffineSpec(8, 16, "token")),
    ((3, 4, 3), AffineSpec(5, 64, "channel")),
    ((2, 0, 4), AffineSpec(4, 16, "channel")),
    ((0, 3, 4), AffineSpec(7, 16, "token")),
]


def check_against_oracle(xp, x, spec, range_dtype=None):
    ranges = np.dtype(DTYPES[range_dtype]) if range_dtype else x.dtype
    expected = oracle.quantize(x, spec.bits, spec.group_size, spec.axis, ranges)
    codes, minimum, maximum = xp.run(quantize, xp.asarray(x), spec=spec)
    assert all(map(xp.owns, (codes, minimum, maximum)))
    packed = oracle.pack_rows(expected[0], spec.bits)
    assert codes.shape == packed.shape
    assert codes.shape[-2:] == spec.codes_shape(*x.shape[-2:])
    assert minimum.shape[-2:] == spec.range_shape(*x.shape[-2:])
    np.testing.assert_array_equal(xp.numpy(codes), packed, strict=True)
    same_bits(xp.numpy(minimum), expected[1])
    same_bits(xp.numpy(maximum), expected[2])
    return codes, minimum, maximum


def same_bits(a, b):
    assert a.dtype == b.dtype
    view = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(view), np.ascontiguousarray(b).view(view), strict=True
    )


@given(data=st.data())
def test_codes_and_ends_are_the_oracles_bit_for_bit(xp, data):
    number, (shape, spec) = data.draw(st.sampled_from(xp.few(list(enumerate(CASES)))))
    x = data.draw(tensors(shape, xp.dtypes[number % len(xp.dtypes)]))
    codes, minimum, maximum = check_against_oracle(xp, x, spec)
    # The error is at most half a step, and rounding.
    back = xp.run(dequantize, codes, minimum, maximum, spec=spec, channels=shape[-1])
    assert xp.owns(back)
    assert xp.numpy(back).dtype == np.float32
    assert back.shape == shape
    for head in np.ndindex(shape[:-2]):
        ranges = xp.numpy(minimum)[head], xp.numpy(maximum)[head]
        bound = oracle.quantizer_bound(x[head], *ranges, spec.bits, spec.group_size, spec.axis)
        error = abs(xp.numpy(back)[head].astype("float64") - x[head].astype("float64"))
        assert (error <= bound).all(), (error - bound).max()


@given(data=st.data())
@settings(max_examples=10)
@pytest.mark.parametrize("range_dtype", ["float16", "bfloat16"])
def test_ranges_stored_narrower_than_the_source(xp, range_dtype, data):
    if range_dtype not in xp.dtypes:
        pytest.skip(f"{xp} has no {range_dtype}")
    spec = AffineSpec(4, 4, "channel", range_dtype)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = (rng.standard_normal((2, 7, 5)) * 2.0 ** rng.integers(-12, 12, 5)).astype("float32")
    codes, minimum, maximum = check_against_oracle(xp, x, spec, range_dtype)
    back = xp.numpy(xp.run(dequantize, codes, minimum, maximum, spec=spec, channels=5))
    for head in range(2):
        ranges = xp.numpy(minimum)[head], xp.numpy(maximum)[head]
        bound = oracle.quantizer_bound(x[head], *ranges, 4, 4, "channel")
        assert (abs(back[head].astype("float64") - x[head]) <= bound).all()


def recipe(x, bits):
    """Codes of ``[groups, size]`` by the published recipe, in NumPy's float32."""
    minimum, maximum = x.min(1, keepdims=True), x.max(1, keepdims=True)
    inverse = np.float32(2**bits - 1) / (maximum - minimum)
    return np.rint((x - minimum) * inverse).astype("uint8")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_hundred_thousand_codes(xp, bits):
    """Enough of them to meet codes that one rounding more or less would change."""
    if xp.name == "jax" and bits not in (3, 8):
        pytest.skip("compiled as a whole it is one compilation, and tested")
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((1, 1024, 96)) * 2.0 ** rng.integers(-8, 8, 96)
    x[:, ::5] = np.round(x[:, ::5] * 2) / 2  # ties
    for dtype in xp.dtypes:
        source = x.astype(DTYPES[dtype])
        wide = source[0].astype("float32")
        codes, _, _ = xp.run(quantize, xp.asarray(source), spec=AffineSpec(bits, 64, "channel"))
        columns = wide.reshape(16, 64, 96).transpose(0, 2, 1).reshape(-1, 64)
        expected = recipe(columns, bits).reshape(16, 96, 64).transpose(0, 2, 1)
        expected = expected.reshape(1, 1024, 96)
        np.testing.assert_array_equal(unpack(xp.numpy(codes), bits, 96), expected)
        codes, _, _ = xp.run(quantize, xp.asarray(source), spec=AffineSpec(bits, 32, "token"))
        expected = recipe(wide.reshape(-1, 32), bits).reshape(1, 1024, 96)
        np.testing.assert_array_equal(unpack(xp.numpy(codes), bits, 96), expected)


@given(data=st.data())
def test_quantizing_what_was_dequantized_changes_nothing(xp, data):
    shape, spec = data.draw(st.sampled_from(xp.few([c for c in CASES if 0 not in c[0]])))
    x = data.draw(tensors(shape, "float32"))
    codes, minimum, maximum = xp.run(quantize, xp.asarray(x), spec=spec)
    once = xp.run(dequantize, codes, minimum, maximum, spec=spec, channels=shape[-1])
    codes2, minimum2, maximum2 = xp.run(quantize, once, spec=spec)
    once, minimum, maximum = xp.numpy(once), xp.numpy(minimum), xp.numpy(maximum)
    old, new = (oracle.unpack_rows(xp.numpy(c), spec.bits, shape[-1]) for c in (codes, codes2))
    minimum2, maximum2 = xp.numpy(minimum2), xp.numpy(maximum2)
    for head in np.ndindex(shape[:-2]):
        members = oracle.groups(*shape[-2:], spec.group_size, spec.axis)
        for at, positions in members.items():
            low, high = float(minimum[head][at]), float(maximum[head][at])
            off = oracle.decode_rounding(low, high) + 2 * oracle.TINY
            values = [float(x[head][p]) for p in positions]
            if min(values) != low or max(values) != high:
                continue  # a minimum too small was stored as zero
            # The least value decodes to itself, the greatest to within the rounding.
            assert minimum2[head][at] == minimum[head][at]
            assert abs(float(maximum2[head][at]) - high) <= off
            # A decoded value is at most 2 off / step away from its code, in steps, and 4 float32
            # roundings of at most 255; under a quarter, it rounds back to its code.
            step = (high - low) / (2**spec.bits - 1)
            if off < step / 9:
                assert all(old[head][p] == new[head][p] for p in positions)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_views_give_the_same_codes(xp, axis):
    spec = AffineSpec(3, 4, axis)
    x = np.random.default_rng(0).standard_normal((2, 6, 10)).astype("float32")
    expected = [np.asarray(a) for a in quantize(x, spec=spec)]
    wide = np.zeros((2, 12, 20), "float32")
    wide[:, ::2, ::2] = x
    turned = xp.asarray(np.ascontiguousarray(x.transpose(2, 0, 1)))
    permute = xp.module.permute if xp.name == "torch" else _permute(xp)
    views = [
        xp.asarray(wide)[:, ::2, ::2],
        permute(turned, (1, 2, 0)),
        xp.asarray(np.concatenate([x * 0, x]))[2:, ...],
    ]
    for view in views:
        for a, b in zip(xp.run(quantize, view, spec=spec), expected, strict=True):
            same_bits(xp.numpy(a), b)


def _permute(xp):
    return getattr(xp.module, "permute_dims", None) or xp.module.transpose


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -65504.0, 2.0**-130, 2.0**126])
def test_constant_groups_come_back(xp, value):
    x = np.full((1, 5, 4), value, "float32")
    spec = AffineSpec(4, 4, "channel")
    codes, minimum, maximum = xp.run(quantize, xp.asarray(x), spec=spec)
    assert not xp.numpy(codes).any()
    back = xp.numpy(xp.run(dequantize, codes, minimum, maximum, spec=spec, channels=4))
    # Denormals count as zero, everywhere, and zero has one sign.
    expected = x if abs(value) >= 2.0**-100 else np.zeros_like(x)
    same_bits(back, expected)
    same_bits(xp.numpy(minimum), expected[:, :2])


def test_ties_round_to_even(xp):
    # Minimum 0, maximum 3: two bits, step 1; halves lie between two codes.
    x = np.array([[[0.0], [0.5], [1.5], [2.5], [3.0]]], "float32")
    codes, _, _ = xp.run(quantize, xp.asarray(x), spec=AffineSpec(2, 8, "channel"))
    assert xp.numpy(codes).ravel().tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 128, 129])
def test_groups_run_where_they_should(size):
    """Every group has a range of its own, and no value widens another group."""
    x = np.arange(size, dtype="float32")[None, :, None] ** 2
    for spec, y in (
        (AffineSpec(8, 64, "channel"), x),
        (AffineSpec(8, 64, "token"), x.transpose(0, 2, 1)),
    ):
        _, minimum, maximum = quantize(y, spec=spec)
        starts = range(0, size, 64)
        assert minimum.ravel().tolist() == [i**2 for i in starts]
        assert maximum.ravel().tolist() == [(min(i + 64, size) - 1) ** 2 for i in starts]


@given(x=tensors((2, 7, 5), "float32"))
def test_arguments_are_left_alone(x):
    before = x.copy()
    spec = AffineSpec(4, 4, "channel")
    encoded = quantize(x, spec=spec)
    kept = [a.copy() for a in encoded]
    dequantize(*encoded, spec=spec, channels=5)
    same_bits(x, before)
    for a, b in zip(encoded, kept, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decodes_to_a_narrower_dtype(xp, dtype):
    if dtype not in xp.dtypes:
        pytest.skip(f"{xp} has no {dtype}")
    spec = AffineSpec(4, 4, "token")
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32") * 1e5
    encoded = xp.run(quantize, xp.asarray(x), spec=spec)
    wide = xp.numpy(xp.run(dequantize, *encoded, spec=spec, channels=8))
    out = xp.numpy(xp.run(dequantize, *encoded, spec=spec, channels=8, dtype=dtype))
    assert out.dtype == DTYPES[dtype]
    assert (abs(wide) > 65504).any()
    expected = np.clip(wide, -65504, 65504) if dtype == "float16" else wide
    np.testing.assert_array_equal(out, expected.astype(out.dtype))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_groups_longer_than_rows_take_no_more_memory(xp, axis):
    x = xp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32"))
    spec, whole = AffineSpec(2, 2**40, axis), AffineSpec(2, 16, axis)
    codes, minimum, maximum = xp.run(quantize, x, spec=spec)
    got = codes, minimum, maximum, xp.run(clip_groups, x, spec=spec)
    expected = *xp.run(quantize, x, spec=whole), xp.run(clip_groups, x, spec=whole)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(xp.numpy(a), xp.numpy(b))
    y = xp.run(dequantize, codes, minimum, maximum, spec=spec, channels=16)
    assert tuple(y.shape) == (2, 5, 16)
