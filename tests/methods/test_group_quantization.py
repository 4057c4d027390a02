from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import bfloat16
from kvcompress import GroupQuantization, KVCacheCompressor, TensorSpec
from kvcompress.backend import Dispatcher
from kvcompress.errors import SettingError
from kvcompress.ops import AffineSpec, clip_groups
from kvcompress.testing.strategies import tensors

DTYPES = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": bfloat16}
CLIPS = [
    ((2, 7, 5), AffineSpec(2, 4, "channel")),
    ((2, 7, 5), AffineSpec(2, 3, "token")),
    ((1, 33, 8), AffineSpec(3, 32, "channel")),
    ((1, 1, 1), AffineSpec(2, 2, "channel")),
    ((2, 0, 4), AffineSpec(2, 16, "channel")),
    ((0, 3, 4), AffineSpec(2, 16, "token")),
]
METHODS = [
    GroupQuantization(2, 8),
    GroupQuantization(4, 7, "token", "channel"),
    GroupQuantization(3, 64),
    GroupQuantization(8, 16),
]


def encode(x, *, method, role="keys"):
    return method.encode(x, role, Dispatcher())


def decode(payload, *, method, spec, role="keys"):
    """In float32: what narrowing adds is tested with the operations."""
    return method.decode(payload, replace(spec, dtype="float32"), role, Dispatcher())


def integer_error(values, low, high, bits):
    """Squared error of bytes in a range cut by `low` and `high` sixteenths, as documented."""
    start, stop = low / 16, 1 - high / 16
    step, total = (stop - start) / (2**bits - 1), 0
    for value in values:
        code = min(max(round((value / 255 - start) / step), 0), 2**bits - 1)
        total += round((value / 255 - start - code * step) ** 2 * 2**16)
    return total


def clip_by_the_book(x, spec):
    """The best of all pairs of cuts, tried one by one."""
    out = x.astype("float32")
    codes, minimum, maximum = oracle.quantize(x, 8, spec.group_size, spec.axis, x.dtype)
    for head in np.ndindex(x.shape[:-2]):
        members = oracle.groups(*x.shape[-2:], spec.group_size, spec.axis)
        for at, positions in members.items():
            values = [int(codes[head][p]) for p in positions]
            pairs = list(itertools.product(range(4), range(4)))
            low, high = min(pairs, key=lambda pair: integer_error(values, *pair, spec.bits))
            start, stop = np.float32(minimum[head][at]), np.float32(maximum[head][at])
            sixteenth = (stop - start) / np.float32(16)
            for _ in range(low):
                start = start + sixteenth
            for _ in range(high):
                stop = stop - sixteenth
            for p in positions:
                out[head][p] = min(max(np.float32(x[head][p]), start), stop)
    return out


@given(data=st.data())
def test_the_best_range_of_every_group_bit_for_bit(xp, data):
    number, (shape, spec) = data.draw(st.sampled_from(xp.few(list(enumerate(CLIPS)))))
    x = data.draw(tensors(shape, xp.dtypes[number % len(xp.dtypes)]))
    out = xp.run(clip_groups, xp.asarray(x), spec=spec)
    assert xp.owns(out)
    # Denormals aside, which some flush.
    expected = clip_by_the_book(x, spec)
    np.testing.assert_allclose(xp.numpy(out), expected, rtol=0, atol=oracle.TINY, strict=True)


def restored(x, method, role="keys"):
    spec = TensorSpec(x.shape, x.dtype.name)
    payload = encode(x, method=method, role=role)
    return decode(payload, method=method, spec=spec, role=role).astype("float64")


@pytest.mark.parametrize("group_size", [32, 64])
def test_clipping_takes_a_quarter_of_the_error_away(group_size):
    """Of normal numbers; without it the range is that of the group."""
    x = np.random.default_rng(0).standard_normal((2, 1024, 16)).astype("float32")
    columns = x.reshape(2, -1, group_size, 16).astype("float64")
    minimum, maximum = columns.min(2, keepdims=True), columns.max(2, keepdims=True)
    step = (maximum - minimum) / 3
    plain = ((np.rint((columns - minimum) / step) * step + minimum - columns) ** 2).sum()
    error = ((restored(x, GroupQuantization(2, group_size)) - x) ** 2).sum()
    assert error < 0.75 * plain


def parts(payload, method, role, spec):
    """Codes, minima and maxima, in float64."""
    affine = AffineSpec(method.bits, method.group_size, axis_of(method, role))
    codes = oracle.unpack_rows(payload["codes"], method.bits, spec.shape[-1])
    _, columns = affine.range_shape(*spec.shape[1:])
    ranges = payload["ranges"].astype("float64")
    if method.bits != 8:
        n = ranges.shape[1]
        low, high = (
            np.repeat(payload[f"ranges_{name}"].astype("float64"), 32, axis=1)[:, :n]
            for name in ("min", "max")
        )
        ranges = low + ranges * (high - low) / 255
    return codes, ranges[..., :columns], ranges[..., columns:]


def axis_of(method, role):
    return method.key_axis if role == "keys" else method.value_axis


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", [(2, 67, 10), (1, 1, 3), (2, 0, 8), (0, 5, 8)])
def test_encode_as_promised_and_decode_as_the_oracle(xp, method, shape, role):
    if xp.name == "jax" and (shape[1] < 60 or role == "values" or method.bits > 2):
        pytest.skip("compiled as a whole it is one compilation, and tested")
    for dtype in xp.dtypes[: 1 if xp.name == "jax" else 3]:
        x = (np.random.default_rng(0).standard_normal(shape) + 1).astype(DTYPES[dtype])
        spec, array = TensorSpec(shape, dtype), xp.asarray(x)
        payload = xp.run(encode, array, method=method, role=role)
        np.testing.assert_array_equal(xp.numpy(array), x)  # left alone
        out = xp.run(decode, payload, method=method, spec=spec, role=role)
        assert xp.owns(out)
        assert all(map(xp.owns, payload.values()))
        arrays = {name: xp.numpy(a) for name, a in payload.items()}
        found = {name: TensorSpec(a.shape, a.dtype.name) for name, a in arrays.items()}
        assert found == method.encoded_spec(spec, role)
        out = xp.numpy(out)
        codes, minimum, maximum = parts(arrays, method, role, spec)
        for head in range(shape[0]):
            members = oracle.groups(*shape[1:], method.group_size, axis_of(method, role))
            for at, positions in members.items():
                low, high = minimum[head][at], maximum[head][at]
                step = (high - low) / (2**method.bits - 1)
                for p in positions:
                    # Two affine decodings of numbers below 8, a dozen roundings each.
                    expected = low + codes[head][p] * step
                    assert abs(out[head][p] - expected) <= 8 * oracle.gamma(24)


@given(data=st.data())
def test_the_error_is_half_a_step_and_that_of_the_ends(data):
    """From 3 bits on, where nothing is clipped."""
    role = data.draw(st.sampled_from(["keys", "values"]))
    method = GroupQuantization(
        data.draw(st.sampled_from([3, 4, 8])),
        data.draw(st.sampled_from([2, 7, 64])),
        *data.draw(st.tuples(*[st.sampled_from(["channel", "token"])] * 2)),
    )
    shape = data.draw(st.sampled_from([(2, 35, 5), (1, 3, 8)]))
    x = data.draw(tensors(shape, data.draw(st.sampled_from(list(DTYPES)))))
    payload = encode(x, method=method, role=role)
    spec = TensorSpec(x.shape, x.dtype.name)
    out = decode(payload, method=method, spec=spec, role=role)
    axis = axis_of(method, role)
    codes, minimum, maximum = oracle.quantize(x, method.bits, method.group_size, axis, x.dtype)
    np.testing.assert_array_equal(payload["codes"], oracle.pack_rows(codes, method.bits))
    ranges = np.concat([minimum, maximum], axis=-1)
    if method.bits == 8:
        assert payload["ranges"].tobytes() == ranges.tobytes()
        away = np.zeros(ranges.shape)
    else:
        outer = payload["ranges_min"], payload["ranges_max"]
        away = np.stack(
            [
                oracle.quantizer_bound(ranges[h], outer[0][h], outer[1][h], 8, 32, "channel")
                for h in range(shape[0])
            ]
        )
    columns = minimum.shape[-1]
    for h in range(shape[0]):
        bound = oracle.quantizer_bound(
            x[h], minimum[h], maximum[h], method.bits, method.group_size, axis
        )
        for at, positions in oracle.groups(*shape[1:], method.group_size, axis).items():
            # A decoded value lies in its range and moves no further than that does.
            moved = max(away[h][at], away[h][at[0], columns + at[1]])
            largest = max(abs(float(minimum[h][at])), abs(float(maximum[h][at])))
            rounding = 2 * oracle.gamma(12) * (largest + moved)
            for p in positions:
                assert abs(out[h][p] - float(x[h][p])) <= bound[p] + moved + rounding


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (8, 64)])
def test_bits_are_what_the_formula_says(bits, group_size):
    x = np.random.default_rng(0).standard_normal((1, 2, 2048, 64)).astype("float16")
    method = GroupQuantization(bits, group_size)
    compressed = KVCacheCompressor(method).compress_kv(x, x)
    end = 16 if bits == 8 else 8 + 2 * 16 / 32
    assert compressed.coded_bits_per_value == bits + 2 * end / group_size
    assert compressed.nbytes == KVCacheCompressor(method).estimate_size(x.shape)


def test_the_compressor_fills_in_the_bits():
    x = np.random.default_rng(0).standard_normal((1, 1, 64, 8)).astype("float32")
    for bits in (2, 3, 4, 8):
        compressed = KVCacheCompressor(GroupQuantization(), bits).compress_kv(x, x)
        assert compressed.keys.method == GroupQuantization(bits)
    with pytest.raises(SettingError, match="bits = 0"):
        GroupQuantization().encoded_spec(TensorSpec((1, 2, 3), "float32"), "keys")


def test_keys_and_values_have_axes_of_their_own():
    rng = np.random.default_rng(0)
    # Constant in every channel, then in every token.
    x = np.zeros((1, 64, 32), "float32") + rng.standard_normal(32).astype("float32")
    y = np.zeros((1, 64, 32), "float32") + rng.standard_normal((64, 1)).astype("float32")
    method = GroupQuantization(4, 16)
    swapped = GroupQuantization(4, 16, "token", "channel")
    for tensor, good, bad in ((x, "keys", "values"), (y, "values", "keys")):
        assert abs(restored(tensor, method, good) - tensor).max() < 0.01
        assert abs(restored(tensor, swapped, bad) - tensor).max() < 0.01
        assert abs(restored(tensor, method, bad) - tensor).max() > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits must be 2, 3, 4, 8, or 0 for quant_bits, got 1"),
        ({"bits": True}, "bits must be 2, 3, 4, 8, or 0 for quant_bits, got True"),
        ({"bits": 4, "group_size": 1}, "group_size must be an integer >= 2, got 1"),
        ({"key_axis": "head"}, 'key_axis must be "channel" or "token", got \'head\''),
        ({"value_axis": 0}, 'value_axis must be "channel" or "token", got 0'),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        GroupQuantization(**settings)
