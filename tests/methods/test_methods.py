from __future__ import annotations

import json
import math
import pickle
from itertools import pairwise

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import (
    Hybrid,
    KVCacheCompressor,
    LowRank,
    Method,
    TensorSpec,
    TransformCoding,
    VectorQuantization,
    methods,
)
from kvcompress.backend import Dispatcher
from kvcompress.errors import DTypeError, NamespaceError, NonFiniteError, SettingError
from kvcompress.ops import cast
from kvcompress.testing import strategies as kvst

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
SHAPE = (3, 37, 8)
METHODS = [
    LowRank(3),
    Hybrid(8, 4, group_size=16, outliers=0.05),
    Hybrid(5, 2, outliers=0.0),
    VectorQuantization(16, exact=0.0, iterations=2),
    VectorQuantization(5, vector_dim=4, exact=0.1, iterations=3),
]


def tensor(dtype="float32", shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) @ (0.7 ** np.arange(shape[-1])[:, None] * np.eye(shape[-1]))
    return (x + rng.standard_normal(shape[-1])).astype(DTYPES[dtype])


def encode(x, *, method):
    return method.encode(x, "keys", Dispatcher())


def decode(payload, *, method, spec):
    """As the compressor does: `cast` narrows what the method restores."""
    return cast(method.decode(payload, spec, "keys", Dispatcher()), dtype=spec.dtype)


def spec_of(x):
    return TensorSpec(x.shape, x.dtype.name)


def check_payload(xp, payload, method, spec):
    """`encoded_spec` told the truth, and every array is the library's."""
    promised = method.encoded_spec(spec, "keys")
    assert list(payload) == list(promised) or sorted(payload) == sorted(promised)
    for name, array in payload.items():
        assert xp.owns(array)
        found = xp.numpy(array)
        assert TensorSpec(found.shape, found.dtype.name) == promised[name], name
        assert promised[name].nbytes == found.nbytes


def rounded(expected, magnitude, dtype, roundings):
    """How far a result may be from `expected`: float32 sums of `magnitude`, then the dtype."""
    inner = oracle.gamma(roundings) * magnitude
    return inner + oracle.UNIT[dtype] * (abs(expected) + inner) + oracle.SMALLEST[dtype]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_encode_as_promised_and_decode_as_the_oracle(xp, method):
    for dtype in xp.dtypes:
        x = tensor(dtype)
        spec, array = spec_of(x), xp.asarray(x)
        payload = xp.run(encode, array, method=method)
        check_payload(xp, payload, method, spec)
        np.testing.assert_array_equal(xp.numpy(array), x)  # left alone
        out = xp.run(decode, payload, method=method, spec=spec)
        assert xp.owns(out)
        out = xp.numpy(out)
        assert spec_of(out) == spec
        arrays = {name: xp.numpy(a) for name, a in payload.items()}
        if isinstance(method, LowRank):
            expected = oracle.decode_low_rank(arrays)
        elif isinstance(method, Hybrid):
            expected = oracle.decode_hybrid(
                arrays, method.quant_bits, method.group_size, method.rank
            )
        else:
            bits = math.ceil(math.log2(method.codebook_size))
            expected = oracle.decode_vector_quantization(arrays, bits)
        # Coefficients are at most 2 sqrt(8), a basis row sums to at most sqrt(8): 16, and a mean;
        # a dozen roundings each, and the sum over the rank.
        bound = rounded(expected, 17 * arrays["scale"].astype("float64"), dtype, 12 + SHAPE[-1])
        assert (abs(out.astype("float64") - expected) <= bound).all()
        if isinstance(method, VectorQuantization):
            for h in range(SHAPE[0]):  # exact tokens, bit for bit
                kept = arrays["exact_index"][h]
                assert len(set(kept.tolist())) == math.ceil(method.exact * SHAPE[1])
                assert out[h, kept].tobytes() == x[h, kept].tobytes()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 0, 8), (0, 5, 8)])
def test_one_token_no_token_no_head(xp, method, shape):
    x = tensor(shape=shape)
    payload = xp.run(encode, xp.asarray(x), method=method)
    check_payload(xp, payload, method, spec_of(x))
    out = xp.numpy(xp.run(decode, payload, method=method, spec=spec_of(x)))
    assert out.shape == shape
    # One token is its own mean: it comes back to rounding.
    np.testing.assert_allclose(out, x, rtol=oracle.gamma(30), atol=oracle.gamma(30) * 3)


@pytest.mark.parametrize("method", [LowRank(2), Hybrid(2, 4), VectorQuantization(4)], ids=str)
def test_the_ends_of_float16_do_not_become_infinite(xp, method):
    if "float16" not in xp.dtypes:
        pytest.skip(f"{xp} has no float16")
    rng = np.random.default_rng(0)
    x = (np.sign(rng.standard_normal((1, 64, 16))) * 65504).astype("float16")
    x[:, :32] = 65504 * rng.uniform(0.9, 1, (1, 32, 16))
    payload = xp.run(encode, xp.asarray(x), method=method)
    out = xp.numpy(xp.run(decode, payload, method=method, spec=spec_of(x)))
    assert np.isfinite(out).all()
    assert abs(out).max() == 65504


@given(data=st.data())
def test_encoded_spec_is_reality(data):
    shape, _ = data.draw(kvst.kv_shapes(ndim=3))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    method = data.draw(kvst.methods(shape[-1])).bind(data.draw(st.sampled_from((2, 3, 4, 8))))
    x = data.draw(kvst.tensors(shape, dtype))
    before = x.tobytes()
    payload = encode(x, method=method)
    check_payload(NUMPY, payload, method, spec_of(x))
    out = decode(payload, method=method, spec=spec_of(x))
    assert spec_of(out) == spec_of(x)
    assert np.isfinite(out.astype("float64")).all()
    assert x.tobytes() == before
    again = encode(x, method=method)
    assert all(payload[name].tobytes() == again[name].tobytes() for name in payload)


class NUMPY:
    numpy = staticmethod(np.asarray)

    @staticmethod
    def owns(x):
        return type(x) is np.ndarray


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_low_rank_error_is_the_discarded_eigenvalues(xp, rank):
    """In the public dtype; `test_pca` derives the bound for every step."""
    for dtype in xp.dtypes:
        x = tensor(dtype, (2, 200, 8), seed=rank)
        payload = xp.run(encode, xp.asarray(x), method=LowRank(rank))
        out = xp.numpy(xp.run(decode, payload, method=LowRank(rank), spec=spec_of(x)))
        for head in range(2):
            wide = x[head].astype("float64")
            error = np.linalg.norm(out[head].astype("float64") - wide)
            eigenvalues = oracle.spectrum(wide) * len(wide)
            # Basis, coefficients, mean and result each round once to the dtype.
            size = math.sqrt(eigenvalues.sum())
            off = oracle.UNIT[dtype] * (3 * math.sqrt(rank) * size + 2 * np.linalg.norm(wide))
            peak = abs(wide).max()
            off += oracle.gamma(20 * 200) * math.sqrt(rank) * size + oracle.SMALLEST[
                dtype
            ] * peak * math.sqrt(wide.size * 8)
            best = math.sqrt(eigenvalues[rank:].sum())
            assert abs(error - best) <= off + best * oracle.UNIT[dtype]


def test_low_rank_of_its_own_result_changes_nothing(xp):
    x = xp.asarray(tensor())
    spec, method = spec_of(tensor()), LowRank(3)
    once = xp.run(decode, xp.run(encode, x, method=method), method=method, spec=spec)
    twice = xp.run(decode, xp.run(encode, once, method=method), method=method, spec=spec)
    once, twice = xp.numpy(once).astype("float64"), xp.numpy(twice).astype("float64")
    # What is discarded now is the rounding of the first result, and that of the second time.
    peak = abs(once).max()
    assert np.linalg.norm(twice - once) <= oracle.gamma(20 * 37) * peak * math.sqrt(once.size)
    assert np.linalg.norm(once - tensor()) > 0.1 * np.linalg.norm(twice)


@pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Hybrid)], ids=str)
def test_hybrid_coefficients_are_off_by_half_a_step(xp, method):
    for dtype in xp.dtypes:
        x = tensor(dtype)
        payload = {k: xp.numpy(a) for k, a in xp.run(encode, xp.asarray(x), method=method).items()}
        coded = oracle.unpack_rows(payload["codes"], method.quant_bits, method.rank)
        ranges, moved = oracle.decode_ranges(payload, method.quant_bits)
        for h in range(SHAPE[0]):
            scale, mean = float(payload["scale"][h, 0, 0]), payload["mean"][h].astype("float64")
            basis = payload["basis"][h].astype("float64")
            true = (x[h].astype("float64") / scale - mean) @ basis
            kept = {
                (int(i) // method.rank, int(i) % method.rank) for i in payload["outlier_index"][h]
            }
            assert len(kept) == math.ceil(method.outliers * SHAPE[1] * method.rank)
            # float32: x / scale, minus the mean, a sum of 8 products
            computed = oracle.gamma(8 + 3) * 2 * math.sqrt(8) * math.sqrt(8)
            minimum, maximum = ranges[h, :, : method.rank], ranges[h, :, method.rank :]
            away = np.maximum(moved[h, :, : method.rank], moved[h, :, method.rank :])
            found = np.where(
                [[(t, c) in kept for c in range(method.rank)] for t in range(37)], 0, true
            )
            bound = oracle.quantizer_bound(
                found, minimum, maximum, method.quant_bits, method.group_size, "channel"
            )
            for t, c in np.ndindex(true.shape):
                low = float(minimum[t // method.group_size, c])
                high = float(maximum[t // method.group_size, c])
                value = low + coded[h, t, c] * (high - low) / (2**method.quant_bits - 1)
                if (t, c) not in kept:
                    # Minimum and maximum may both have moved, and widened the step.
                    slack = 3 * away[t // method.group_size, c] + computed
                    assert abs(value - true[t, c]) <= bound[t, c] + slack
            for i, value in zip(
                payload["outlier_index"][h], payload["outlier_value"][h], strict=True
            ):
                exact = true[i // method.rank, i % method.rank]
                assert (
                    abs(float(value) - exact) <= computed + oracle.UNIT[dtype] * abs(exact) * 1.01
                )
            # Those kept are the farthest from zero, in standard deviations of their component.
            score = abs(true) / np.sqrt((true**2).sum(0))
            rest = [score[p] for p in np.ndindex(score.shape) if p not in kept]
            if kept:
                assert min(score[p] for p in kept) >= max(rest) - 1e-5


def test_an_outlier_widens_no_group():
    x = np.random.default_rng(0).standard_normal((1, 64, 1)).astype("float32")
    x[0, 17] = 200
    errors = []
    for method in (Hybrid(1, 3, outliers=0.01), Hybrid(1, 3, outliers=0.0)):
        out = decode(encode(x, method=method), method=method, spec=spec_of(x))
        errors.append(np.delete(out - x, 17, axis=1).std())
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize(
    "method", [m for m in METHODS if isinstance(m, VectorQuantization)], ids=str
)
def test_vectors_get_the_nearest_centroid_and_the_worst_stay_exact(xp, method):
    for dtype in xp.dtypes:
        x = tensor(dtype)
        payload = {k: xp.numpy(a) for k, a in xp.run(encode, xp.asarray(x), method=method).items()}
        dim = method.vector_dim or 8
        codebook = payload["codebook"].astype("float64")
        assert codebook.shape == (method.codebook_size, dim)
        bits = math.ceil(math.log2(method.codebook_size))
        codes = oracle.unpack_rows(payload["codes"], bits, 8 // dim)
        centered = x.astype("float64") / payload["scale"] - payload["mean"].astype("float64")
        d = oracle.distances(centered.reshape(-1, dim), codebook)
        chosen = np.take_along_axis(d, codes.reshape(-1, 1), 1)[:, 0]
        # Norms and products of numbers up to 2, in float32, twice.
        slack = 2 * oracle.gamma(dim + 6) * dim * 8
        assert (chosen - d.min(1) <= slack).all()
        error = chosen.reshape(3, 37, 8 // dim).sum(-1)
        for h in range(3):
            kept = payload["exact_index"][h]
            if len(kept):
                assert error[h, kept].min() >= np.delete(error[h], kept).max(initial=0) - 8 * slack


def test_the_seed_decides():
    x = tensor()
    a, b, c = (encode(x, method=VectorQuantization(16, seed=s, iterations=1)) for s in (3, 3, 4))
    assert a["codebook"].tobytes() == b["codebook"].tobytes()
    assert a["codebook"].tobytes() != c["codebook"].tobytes()


def test_more_of_everything_serves_better():
    x = tensor(shape=(2, 256, 8))

    def error(method):
        out = decode(encode(x, method=method), method=method, spec=spec_of(x))
        return float(((out - x) ** 2).sum())

    for family in (
        [LowRank(r) for r in (1, 2, 4, 7)],
        [Hybrid(8, b) for b in (1, 2, 4, 8)],
        [Hybrid(r, 8) for r in (1, 2, 4, 7)],
        [VectorQuantization(c) for c in (2, 8, 64)],
        [VectorQuantization(16, vector_dim=d) for d in (8, 4, 2, 1)],
        [VectorQuantization(8, exact=e) for e in (0.0, 0.1, 0.5, 1.0)],
    ):
        errors = [error(method) for method in family]
        assert all(b < a for a, b in pairwise(errors)), family


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_fit_finds_the_smallest_rank(xp, energy):
    x = tensor(shape=(3, 90, 8))
    rank = LowRank.fit(xp.asarray(x), energy=energy).rank
    shares = [np.cumsum(s) / s.sum() for s in map(oracle.spectrum, x)]
    assert all(s[rank - 1] >= energy - 1e-5 for s in shares)
    assert rank == 1 or any(s[rank - 2] < energy + 1e-5 for s in shares)


def test_fit_looks_at_all_heads_keys_and_values(xp):
    flat = np.ones((1, 2, 20, 8), "float32") * np.arange(20, dtype="float32")[:, None]
    x = xp.asarray(flat)
    full = xp.asarray(tensor(shape=(1, 2, 20, 8)))
    assert LowRank.fit(x, energy=0.99).rank == 1
    assert LowRank.fit(x, full, energy=0.99).rank == LowRank.fit(full, energy=0.99).rank > 1
    assert LowRank.fit(xp.asarray(flat[:, :, :0]), energy=0.99).rank == 1


def test_fit_refuses_what_compress_refuses():
    x = tensor()
    with pytest.raises(DTypeError, match="float64"):
        LowRank.fit(x.astype("float64"))
    with pytest.raises(NonFiniteError):
        LowRank.fit(np.where(x == x[0, 0, 0], np.nan, x))
    with pytest.raises(NamespaceError):
        LowRank.fit([[1.0]])
    for energy in (0, -1, 1.1, math.nan, "0.5", True):
        with pytest.raises(SettingError, match=r"energy must be in \(0, 1\]"):
            LowRank.fit(x, energy=energy)


@given(st.integers(1, 12).flatmap(kvst.methods))
def test_methods_are_values(method):
    settings = json.loads(json.dumps(method.to_dict()))
    assert Method.from_dict(settings) == method
    assert hash(Method.from_dict(settings)) == hash(method)
    assert pickle.loads(pickle.dumps(method)) == method
    assert eval(repr(method), dict(vars(methods))) == method
    with pytest.raises(AttributeError):
        method.rank = 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "Zip"},
        {"method": []},
        {"method": "LowRank"},
        {"method": "LowRank", "rank": 2, "rang": 3},
        {"method": "LowRank", "rank": "2"},
        {"method": "Hybrid", "rank": 0},
    ],
)
def test_from_dict_refuses(settings):
    with pytest.raises(SettingError):
        Method.from_dict(settings)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: LowRank(0), "rank", "0"),
        (lambda: LowRank(-3), "rank", "-3"),
        (lambda: LowRank(2.0), "rank", "2.0"),
        (lambda: LowRank(True), "rank", "True"),
        (lambda: Hybrid(0), "rank", "0"),
        (lambda: Hybrid(4, 9), "quant_bits", "9"),
        (lambda: Hybrid(4, -1), "quant_bits", "-1"),
        (lambda: Hybrid(4, group_size=1), "group_size", "1"),
        (lambda: Hybrid(4, outliers=1.5), "outliers", "1.5"),
        (lambda: Hybrid(4, outliers=math.nan), "outliers", "nan"),
        (lambda: VectorQuantization(1), "codebook_size", "1"),
        (lambda: VectorQuantization(65537), "codebook_size", "65537"),
        (lambda: VectorQuantization(8, 0), "vector_dim", "0"),
        (lambda: VectorQuantization(8, exact=-0.1), "exact", "-0.1"),
        (lambda: VectorQuantization(8, iterations=-1), "iterations", "-1"),
        (lambda: VectorQuantization(8, seed=-1), "seed", "-1"),
    ],
)
def test_settings_out_of_range(make, name, value):
    with pytest.raises(SettingError, match=f"^{name} must be .*got {value}$"):
        make()


def test_settings_that_do_not_fit_the_tensor():
    spec = TensorSpec((2, 5, 8), "float32")
    with pytest.raises(SettingError, match="at most head_dim = 8, got 9"):
        LowRank(9).encoded_spec(spec, "keys")
    with pytest.raises(SettingError, match="at most head_dim = 8, got 9"):
        Hybrid(9, 4).encoded_spec(spec, "keys")
    with pytest.raises(SettingError, match=r"divide head_dim = 8 \(1, 2, 4, 8\), got 3"):
        VectorQuantization(4, 3).encoded_spec(spec, "keys")
    with pytest.raises(SettingError, match="quant_bits = 0"):
        Hybrid(4).encoded_spec(spec, "keys")


def test_limits_are_accepted():
    x = tensor(shape=(1, 9, 8))
    for method in (LowRank(8), Hybrid(8, 8, 2, 1.0), VectorQuantization(65536, 8, exact=1.0)):
        out = decode(encode(x, method=method), method=method, spec=spec_of(x))
        np.testing.assert_allclose(out, x, atol=oracle.gamma(200) * 4)


@pytest.mark.library("torch")
@pytest.mark.parametrize(
    "method",
    [LowRank(4), VectorQuantization(4, 4), Hybrid(4, 4), TransformCoding(3)],
    ids=lambda method: type(method).__name__,
)
def test_gradients_pass(method):
    """Through what is not rounded; nothing that they need is written over."""
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compressor = KVCacheCompressor(method, backend="generic")
    k, v = compressor.decompress_kv(compressor.compress_kv(x, x))
    (k.sum() + (v * v).sum()).backward()
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad != 0).any())


def test_outliers_that_32_bits_cannot_number():
    spec = TensorSpec((1, 2**24, 128), "float16")
    with pytest.raises(SettingError, match=r"seq_len \* rank must be below 2\*\*31"):
        Hybrid(128, 4).encoded_spec(spec, "keys")
    assert Hybrid(127, 4).encoded_spec(spec, "keys")
    assert Hybrid(128, 4, outliers=0).encoded_spec(spec, "keys")
