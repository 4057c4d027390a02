from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import bfloat16
from kvcompress import RotatedQuantization, TensorSpec
from kvcompress.arrays import FLOAT16_MAX, on_cpu
from kvcompress.backend import Dispatcher
from kvcompress.errors import SettingError
from kvcompress.ops import RotatedSpec, dequantize_rotated, hadamard, quantize_rotated
from kvcompress.ops.channels import factors
from kvcompress.ops.lloyd_max import levels
from kvcompress.testing.strategies import tensors

DTYPES = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": bfloat16}
CASES = [
    ((2, 3, 16), RotatedSpec(3, 1)),
    ((1, 5, 64), RotatedSpec(8, 0)),
    ((1, 2, 12), RotatedSpec(4, 7)),
    ((3, 2, 1), RotatedSpec(1, 0)),
    ((1, 3, 2), RotatedSpec(2, 2)),
    ((1, 4, 128), RotatedSpec(5, 0)),
    ((2, 0, 8), RotatedSpec(2, 0)),
    ((0, 3, 8), RotatedSpec(7, 0)),
]
DISTORTION = (0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.44e-4, 1.64e-4, 4.12e-5)


def encode(x, *, method, role="values"):
    return method.encode(x, role, Dispatcher())


def decode(payload, *, method, spec, role="values"):
    """In float32: what narrowing adds is tested with the operations."""
    return method.decode(payload, replace(spec, dtype="float32"), role, Dispatcher())


def rotated(x, seed):
    """In float64, by the matrix that the op is tested to be."""
    matrix = hadamard(np.eye(x.shape[-1], dtype="float32"), seed=seed).astype("float64")
    return x.astype("float64") @ matrix


@given(data=st.data())
def test_nearest_levels_and_the_best_gain(xp, data):
    number, (shape, spec) = data.draw(st.sampled_from(xp.few(list(enumerate(CASES)))))
    x = data.draw(tensors(shape, xp.dtypes[number % len(xp.dtypes)]))
    codes, gain = xp.run(quantize_rotated, xp.asarray(x), spec=spec)
    assert xp.owns(codes)
    assert xp.owns(gain)
    codes, gain = xp.numpy(codes), xp.numpy(gain)
    assert codes.shape == (*shape[:-2], *spec.codes_shape(*shape[-2:]))
    assert (codes.dtype, gain.dtype, gain.shape) == (np.uint8, np.float32, (*shape[:-1], 1))
    chosen = oracle.unpack_rows(codes, spec.bits, shape[-1])
    table = levels(spec.bits).astype("float64")
    for row in np.ndindex(shape[:-1]):
        if abs(x[row].astype("float64")).max() < oracle.TINY:
            assert gain[row] == 0
            continue
        y = rotated(x[row], spec.seed)
        z = y / np.sqrt(np.mean(y**2))
        level = table[chosen[row]]
        away = abs(z[:, None] - table).min(1)
        # Thresholds are rounded by 2**-11, which counts twice. The rounding of a rotated value is
        # relative to the root mean square, sqrt(n) of it at most in its n sums.
        n = shape[-1]
        slack = 2**-10 + 2 * oracle.gamma(n + 16) * n
        assert (abs(z - level) <= away + slack).all()
        # Sums of n products, each rounded to 2**-22 of n or so.
        best = y @ level / (level @ level)
        assert gain[row][0] == pytest.approx(best, rel=n * 2**-20)


@given(data=st.data())
@settings(max_examples=10)
def test_the_same_codes_and_gains_everywhere(xp, data):
    """Where channels are a power of two."""
    cases = xp.few([(64, 4), (128, 8), (32, 2), (1, 1)])
    number, (channels, bits) = data.draw(st.sampled_from(list(enumerate(cases))))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    x = rng.standard_normal((2, 200, channels)) * 2.0 ** rng.integers(-8, 8, channels)
    x = x.astype(DTYPES[xp.dtypes[number % len(xp.dtypes)]])
    spec = RotatedSpec(bits, 3)
    got = xp.run(quantize_rotated, xp.asarray(x), spec=spec)
    for a, b in zip(got, quantize_rotated(x, spec=spec), strict=True):
        np.testing.assert_array_equal(xp.numpy(a), b)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("channels", [64, 80])
def test_the_distortion_is_that_of_the_levels(bits, channels):
    """Whatever the channels were: here one outweighs the others, all others shrink."""
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((1, 4000, channels)) * 0.93 ** np.arange(channels)
    x[..., 3] += 2
    spec = RotatedSpec(bits, 0)
    x = x.astype("float32")
    codes, gain = quantize_rotated(x, spec=spec)
    out = dequantize_rotated(codes, gain, spec=spec, channels=channels)
    share = ((out - x).astype("float64") ** 2).sum(-1) / (x.astype("float64") ** 2).sum(-1)
    assert 0.8 * DISTORTION[bits - 1] <= share.mean() <= 1.02 * DISTORTION[bits - 1]


@given(x=tensors((2, 5, 16), "float32"), bits=st.integers(1, 8))
def test_the_error_is_orthogonal_to_what_is_decoded(x, bits):
    """Which makes it the least that any gain reaches, and less than the token itself."""
    spec = RotatedSpec(bits, 0)
    codes, gain = quantize_rotated(x, spec=spec)
    out = dequantize_rotated(codes, gain, spec=spec, channels=16).astype("float64")
    x = x.astype("float64")
    energy = (x**2).sum(-1) + oracle.TINY**2
    inner = ((x - out) * out).sum(-1)
    clipped = abs(out).max(-1) >= 2.0**126
    assert (clipped | (abs(inner) <= 2**-15 * energy)).all()
    assert (((x - out) ** 2).sum(-1) <= energy * (1 + 2**-15)).all()


@given(x=tensors((1, 4, 8), "float16"), power=st.integers(-30, 30))
def test_scaling_by_a_power_of_two_scales_the_gain_alone(x, power):
    x = np.where(abs(x) < 2**-8, 0, x).astype("float32")
    spec = RotatedSpec(4, 0)
    codes, gain = quantize_rotated(x, spec=spec)
    scaled_codes, scaled_gain = quantize_rotated(x * np.float32(2.0**power), spec=spec)
    np.testing.assert_array_equal(scaled_codes, codes)
    np.testing.assert_array_equal(scaled_gain, gain * np.float32(2.0**power))


def decode_in_float64(payload, method, n):
    codes = oracle.unpack_rows(payload["codes"], method.bits, n)
    minimum, maximum = (payload[f"gain_{name}"].astype("float64") for name in ("min", "max"))
    tokens = codes.shape[1]
    minimum, maximum = (np.repeat(a, 32, axis=1)[:, :tokens] for a in (minimum, maximum))
    gain = minimum + payload["gain_codes"] * (maximum - minimum) / 255
    matrix = hadamard(np.eye(n, dtype="float32"), seed=method.seed).astype("float64")
    return levels(method.bits).astype("float64")[codes] * gain @ matrix.T, gain


@pytest.mark.parametrize("method", [RotatedQuantization(3, 5), RotatedQuantization(8)], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 16), (1, 1, 12), (2, 0, 8), (0, 5, 8)])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_encode_as_promised_and_decode_as_the_oracle(xp, method, shape, role):
    if xp.name == "jax" and (shape[1] < 70 or method.bits == 8):
        pytest.skip("compiled as a whole it is one compilation, and tested")
    for dtype in xp.dtypes[: 1 if xp.name == "jax" else 3]:
        x = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
        spec, array = TensorSpec(shape, dtype), xp.asarray(x)
        payload = xp.run(encode, array, method=method, role=role)
        np.testing.assert_array_equal(xp.numpy(array), x)  # left alone
        out = xp.run(decode, payload, method=method, spec=spec, role=role)
        assert xp.owns(out)
        assert all(map(xp.owns, payload.values()))
        arrays = {name: xp.numpy(a) for name, a in payload.items()}
        found = {name: TensorSpec(a.shape, a.dtype.name) for name, a in arrays.items()}
        assert found == method.encoded_spec(spec, role)
        expected, gain = decode_in_float64(arrays, method, shape[-1])
        bound = oracle.gamma(2 * shape[-1] + 16) * gain * 5 * shape[-1]
        if role == "keys":
            factor = factors()[arrays["scale"]].astype("float64")
            offset = arrays["offset"].astype("float64")
            expected = expected * factor + offset
            bound = bound * factor + 2.0**-22 * (abs(expected) + abs(offset))
        assert (abs(xp.numpy(out) - expected) <= bound).all()


def test_quantizing_the_gains_costs_next_to_nothing():
    x = np.random.default_rng(0).standard_normal((2, 640, 64)).astype("float16")
    for bits in (1, 2, 4, 6):
        method, spec = RotatedQuantization(bits), TensorSpec(x.shape, "float16")
        out = decode(encode(x, method=method), method=method, spec=spec)
        share = ((out - x.astype("float64")) ** 2).sum() / (x.astype("float64") ** 2).sum()
        assert share <= 1.01 * DISTORTION[bits - 1]
        for role, reference in (("keys", (16 + 8) / 640), ("values", 0)):
            nbytes = sum(s.nbytes for s in method.encoded_spec(spec, role).values())
            assert 8 * nbytes / x.size == pytest.approx(bits + (8 + 2 * 16 / 32) / 64 + reference)


def test_denormals_beside_numbers_that_cancel(xp):
    """What libraries differ in, whether denormals are zero, changes no code."""
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, (400, 8)).astype("float32")
    faint = rng.standard_normal((400, 8)) * np.exp2(rng.integers(-149, -80, (400, 8)))
    x = np.where(rng.random((400, 8)) < 0.5, x, faint.astype("float32"))
    for bits in (1, 4, 8):
        spec = RotatedSpec(bits, 0)
        expected = quantize_rotated(x, spec=spec)
        found = xp.run(quantize_rotated, xp.asarray(x), spec=spec)
        for a, b in zip(found, expected, strict=True):
            assert xp.numpy(a).tobytes() == b.tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_large_constant_channels_of_keys_cost_the_others_nothing(xp, bits):
    """As Qwen2.5's: the error beside channels of magnitude 200 is that without them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 640, 64)).astype("float32")
    large = x.copy()
    large[:, :, [3, 40]] += np.asarray([200.0, -120.0], "float32")
    method, spec = RotatedQuantization(bits), TensorSpec(x.shape, "float32")
    errors = []
    for y in (x, large):
        payload = xp.run(encode, xp.asarray(y), method=method, role="keys")
        out = xp.numpy(xp.run(decode, payload, method=method, spec=spec, role="keys"))
        errors.append(float(np.mean((out - y) ** 2)))
    assert errors[1] < 1.05 * errors[0]
    assert errors[0] < 1.1 * DISTORTION[bits - 1]


def test_more_bits_serve_better():
    x = np.random.default_rng(1).standard_normal((1, 256, 24)).astype("float32")
    errors = []
    for bits in range(1, 9):
        method = RotatedQuantization(bits)
        out = decode(encode(x, method=method), method=method, spec=TensorSpec(x.shape, "float32"))
        errors.append(((out - x) ** 2).sum())
    assert all(b < a / 2 for a, b in pairwise(errors))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_the_largest_values_do_not_become_infinite(xp, dtype, bits):
    if dtype not in xp.dtypes or (xp.name == "jax" and bits != 1):
        pytest.skip("no such dtype, or tested compiled as a whole")
    limit = FLOAT16_MAX if dtype == "float16" else 2.0**126
    signs = hadamard(np.eye(64, dtype="float32"), seed=0)[:, 0] > 0
    x = np.where(np.stack([signs, ~signs, signs | True]), limit, -limit)[None].astype(DTYPES[dtype])
    method, spec = RotatedQuantization(bits), TensorSpec((1, 3, 64), dtype)
    payload = xp.run(encode, xp.asarray(x), method=method)
    out = xp.numpy(xp.run(decode, payload, method=method, spec=spec))
    assert all(np.isfinite(xp.numpy(a).astype("float64")).all() for a in payload.values())
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": 2.0}, "bits must be an integer from 1 to 8, got 2.0"),
        ({"bits": 2, "seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        RotatedQuantization(**settings)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decodes_to_a_narrower_dtype(xp, dtype):
    if dtype not in xp.dtypes:
        pytest.skip(f"{xp} has no {dtype}")
    spec = RotatedSpec(3, 1)
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32") * 1e5
    static = {"spec": spec, "channels": 16}
    encoded = xp.run(quantize_rotated, xp.asarray(x), spec=spec)
    wide = xp.numpy(xp.run(dequantize_rotated, *encoded, **static))
    out = xp.numpy(xp.run(dequantize_rotated, *encoded, **static, dtype=dtype))
    assert out.dtype == DTYPES[dtype]
    assert (abs(wide) > 65504).any()
    expected = np.clip(wide, -65504, 65504) if dtype == "float16" else wide
    np.testing.assert_array_equal(out, expected.astype(out.dtype))


def test_zeros_have_no_gain_even_where_the_levels_round_to_nothing(xp):
    spec = RotatedSpec(8, 0)
    zeros = xp.asarray(np.zeros((1, 2, 1024), "float32"))
    _, gain = xp.run(quantize_rotated, zeros, spec=spec)
    assert not xp.numpy(gain).any()


@pytest.mark.parametrize("values", [1, 48, 64, 2**20])
def test_blocks_give_the_same(xp, values, monkeypatch):
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32")
    spec = RotatedSpec(3, 0)
    expected = quantize_rotated(x, spec=spec)
    monkeypatch.setattr("kvcompress.ops.rotated.values_at_a_time", lambda _: values)
    encoded = quantize_rotated(xp.asarray(x), spec=spec)
    for a, b in zip(encoded, expected, strict=True):
        np.testing.assert_array_equal(xp.numpy(a), b, strict=True)
    out = xp.numpy(dequantize_rotated(*encoded, spec=spec, channels=16))
    monkeypatch.undo()
    decoded = dequantize_rotated(*expected, spec=spec, channels=16)
    np.testing.assert_allclose(out, decoded, rtol=0, atol=1e-5)


@pytest.mark.library("jax")
def test_a_processor_is_told_from_an_accelerator():
    import jax

    assert on_cpu(np.ones(1))
    assert on_cpu(jax.numpy.ones(1)) == (jax.default_backend() == "cpu")
    assert jax.jit(lambda x: x + on_cpu(x))(0.0) == (jax.default_backend() == "cpu")
