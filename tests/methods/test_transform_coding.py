"""Transform coding: its bases, its bytes, and what it does to attention."""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from kvcompress import (
    Calibration,
    CompressedKV,
    KVCacheCompressor,
    LowRank,
    Plan,
    RotatedQuantization,
    TransformCoding,
    plan,
)
from kvcompress.calibration.statistics import LayerStatistics
from kvcompress.calibration.training import (
    code_bytes,
    even_groups,
    key_bases,
    rates,
    train,
    train_role,
    value_bases,
    water_level,
)
from kvcompress.errors import CalibrationError, SettingError, UnknownLayer
from kvcompress.evaluation import metrics
from kvcompress.methods import Method, TensorSpec
from kvcompress.methods._norm_bytes import USUAL, norm_bytes, octaves
from kvcompress.ops import decode_product, encode_product
from kvcompress.plan import FORMAT

HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 8, 6


def make(tokens: int, seed: int, batch: int = 1, dims: tuple[int, int] = (DIM, VALUE_DIM)):
    """Keys, values and queries of correlated channels, with a mean and tokens of unequal size."""
    rng, model = np.random.default_rng(seed), np.random.default_rng(7)
    (d, e), shape = dims, (batch, HEADS, tokens)
    falling = 0.75 ** np.arange(d)
    k = rng.standard_normal((*shape, d)) * falling @ model.standard_normal((HEADS, d, d))
    k += 3 * model.standard_normal((HEADS, 1, d))
    v = rng.standard_normal((*shape, e)) * falling[:e]
    v = v @ model.standard_normal((HEADS, e, e)) + 0.1
    v *= np.exp(rng.standard_normal((*shape, 1)))
    readers = model.standard_normal((HEADS * GROUP, d, d)) * falling[::-1]
    q = rng.standard_normal((batch, HEADS * GROUP, tokens, d)) @ readers / 4
    return k.astype("float32"), v.astype("float32"), q.astype("float32")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    calibration = Calibration(rows=1024, skip=0)
    for seed in range(4):
        calibration.update(0, *make(512, seed))
    return calibration


@pytest.fixture(params=["layer", "head", "own"])
def transform(request, calibration):
    """`TransformCoding` of its settings but the calibration and the scope."""
    if request.param == "own":
        return TransformCoding
    return partial(TransformCoding, calibration=calibration[0], scope=request.param)


@pytest.mark.parametrize("bits", [1.2, 3.0])
def test_everywhere(xp, transform, bits):
    """The same in and out on every library, of the promised size, under the tracer too."""
    compressor = KVCacheCompressor(transform(bits, exact=0.02), sinks=2, window=3)
    for dtype in xp.few(xp.dtypes):
        k, v, _ = make(60, 99, batch=2)
        k, v = (xp.asarray(x.astype(_dtype(dtype))) for x in (k, v))
        compressed = xp.run(compressor.compress_kv, k, v)
        assert compressed.nbytes == compressor.estimate_size(k.shape, v.shape, dtype=dtype)
        restored = xp.run(compressor.decompress_kv, compressed)
        for x, y in zip((k, v), restored, strict=True):
            assert xp.owns(y)
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            x, y = (xp.numpy(a).astype(np.float64) for a in (x, y))
            np.testing.assert_array_equal(y[:, :, :2], x[:, :, :2])
            np.testing.assert_array_equal(y[:, :, -3:], x[:, :, -3:])
            error = metrics.relative_mse(x - x.mean(2, keepdims=True), y - x.mean(2, keepdims=True))
            assert error < {1.2: 0.65, 3.0: 0.2}[bits]


def test_codes_agree_with_numpy(xp, calibration):
    """Projections differ in the last place by library; hardly a code may."""
    compressor = KVCacheCompressor(TransformCoding(2, calibration[0]))
    k, v, _ = make(300, 5)
    ours = xp.run(compressor.compress_kv, xp.asarray(k), xp.asarray(v))
    numpy = compressor.compress_kv(k, v)
    for role in ("keys", "values"):
        for name, array in getattr(numpy, role).payload.items():
            other = xp.numpy(getattr(ours, role).payload[name])
            assert np.sum(other != array) <= 1e-3 * array.size, (role, name)


@pytest.mark.parametrize(("tokens", "batch"), [(0, 1), (1, 1), (5, 0), (0, 0)])
def test_empty(xp, transform, tokens, batch):
    compressor = KVCacheCompressor(transform(2, exact=0.5))
    k, v, _ = make(tokens, 0, batch)
    compressed = xp.run(compressor.compress_kv, xp.asarray(k), xp.asarray(v))
    restored = xp.run(compressor.decompress_kv, compressed)
    assert [tuple(x.shape) for x in restored] == [k.shape, v.shape]


def test_zeros_and_extremes(xp, transform):
    """Zero values stay zero; tokens no calibration foresaw stay finite."""
    compressor = KVCacheCompressor(transform(2))
    k, v = np.zeros((1, HEADS, 6, DIM), "float32"), np.zeros((1, HEADS, 6, VALUE_DIM), "float32")
    k[:, :, 1], v[:, :, 1] = 2.0**120, -(2.0**120)
    k[:, :, 2], v[:, :, 2] = 2.0**-130, 2.0**-120
    compressed = xp.run(compressor.compress_kv, xp.asarray(k), xp.asarray(v))
    restored = xp.run(compressor.decompress_kv, compressed)
    restored = [xp.numpy(x) for x in restored]
    assert all(np.all(np.isfinite(x)) for x in restored)
    np.testing.assert_array_equal(restored[1][:, :, [0, 3, 4, 5]], 0.0)


@pytest.mark.parametrize("factor", [100.0, 0.01, 1000.0])
def test_tokens_far_from_the_usual_norm(xp, transform, factor):
    """Nearly as good as others, measured by their own size; the others are not touched."""
    step = 0.02 * abs(np.log2(factor))  # half a step of the norms there
    k, v, _ = make(60, 99)
    few = k.copy(), v.copy()
    for x in few:
        x[:, :, [5, 40]] *= factor
        x[:, 1, 20] *= factor  # one head of a token alone
    compressor = KVCacheCompressor(transform(4, exact=0.0))
    known = not isinstance(transform, type)

    def errors(pair):
        compressed = xp.run(compressor.compress_kv, *map(xp.asarray, pair))
        restored = [xp.numpy(x) for x in xp.run(compressor.decompress_kv, compressed)]
        size = [np.linalg.norm(x, axis=-1) for x in pair]
        error = [np.linalg.norm(y - x, axis=-1) for x, y in zip(pair, restored, strict=True)]
        return [e / s for e, s in zip(error, size, strict=True)]

    for usual, far in zip(errors((k, v)), errors(few), strict=True):
        changed = np.zeros(usual.shape, dtype=bool)
        changed[:, :, [5, 40]] = changed[:, 1, 20] = True
        if known:
            assert np.all(far[changed] < np.maximum(usual[changed], np.median(usual)) + step)
            np.testing.assert_allclose(far[:, :, :5], usual[:, :, :5], rtol=0.1, atol=0.01)
        assert np.all(np.isfinite(far))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_of_all_numbers_of_a_dtype(xp, calibration, dtype):
    """Norms come back, coarser the farther from what the calibration saw."""
    if dtype not in xp.dtypes:
        pytest.skip(f"no {dtype} in {xp.name}")
    powers = np.arange(-14, 15) if dtype == "float16" else np.arange(-119, 116, 4)
    k, v, _ = make(1, 5)
    k, v = (np.exp2(powers)[:, None] * x / np.linalg.norm(x, axis=-1)[..., None] for x in (k, v))
    compressor = KVCacheCompressor(TransformCoding(6, calibration[0], exact=0.0))
    for i in range(len(powers)):  # alone: the least count as zero beside the largest
        pair = [x[:, :, i : i + 1].astype(_dtype(dtype)) for x in (k, v)]
        compressed = compressor.compress_kv(*map(xp.asarray, pair))
        for x, y in zip(pair, compressor.decompress_kv(compressed), strict=True):
            x, y = (np.asarray(a, dtype=np.float64) for a in (x, xp.numpy(y)))
            found = np.log2(np.linalg.norm(y, axis=-1)) - powers[i]
            assert np.all(np.abs(found) < 0.15 + 0.06 * abs(powers[i])), powers[i]


def test_norm_bytes_by_loops(xp):
    """Every byte is the nearest to what it stands for; steps are equal about the usual norm."""
    bytes_ = np.arange(1, 256, dtype="float32")
    logs = xp.numpy(octaves(xp.asarray(bytes_)))
    assert logs[USUAL - 1] == 0
    assert np.all(np.diff(logs) > 0)
    assert np.all(np.diff(logs[USUAL - 53 : USUAL + 52]) < 0.0474)
    assert np.diff(logs)[np.searchsorted(logs, np.log2(100))] < 0.5
    assert min(-logs[0], logs[-1]) > 250
    zero = xp.asarray(np.zeros(255, dtype="float32"))
    np.testing.assert_array_equal(xp.numpy(norm_bytes(xp.asarray(logs), zero)), bytes_)


def test_product_codes_against_loops(xp):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 7)).astype("float32")
    books = [rng.standard_normal((2, 256, d)).astype("float32") for d in (1, 4, 2)]
    codes = xp.numpy(encode_product(xp.asarray(x), *map(xp.asarray, books)))
    decoded = xp.numpy(decode_product(xp.asarray(codes), *map(xp.asarray, books)))
    for h in range(2):
        for t in range(9):
            start = 0
            for i, book in enumerate(books):
                part = slice(start, start + book.shape[2])
                distance = ((book[h].astype("float64") - x[h, t, part]) ** 2).sum(-1)
                assert distance[codes[h, t, i]] <= distance.min() + 1e-5
                np.testing.assert_array_equal(decoded[h, t, part], book[h, codes[h, t, i]])
                start = part.stop


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_key_basis_measures_logits(calibration, scope):
    """Squared error of the coefficients = mean square of what queries see of it."""
    statistics, rng = calibration[0], np.random.default_rng(1)
    bases = key_bases(statistics, scope)
    error = rng.standard_normal((HEADS, 5, DIM))
    seen = np.einsum("htd,hde,hte->ht", error, statistics.query_moment, error)
    covariance = statistics.key_covariance.reshape(HEADS, DIM, HEADS, DIM)
    if scope == "layer":
        error, seen = error.swapaxes(0, 1).reshape(1, 5, -1), seen.sum(0, keepdims=True)
        covariance = statistics.key_covariance[None]
    else:
        covariance = np.stack([covariance[h, :, h] for h in range(HEADS)])
    coefficients = ((error @ bases.forward) ** 2).sum(-1)
    np.testing.assert_allclose(coefficients, seen, rtol=0.1)  # the ridge adds some
    whitened = np.swapaxes(bases.forward, 1, 2) @ covariance @ bases.forward
    diagonal = np.diagonal(whitened, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal / DIM, bases.distortion, rtol=1e-6, atol=1e-9)
    flat = np.eye(whitened.shape[-1])
    assert np.all(np.abs(whitened - flat * diagonal[:, None]) < 1e-8 * diagonal[:, :1, None])
    identity = bases.forward @ bases.backward
    np.testing.assert_allclose(identity, np.broadcast_to(flat, identity.shape), atol=1e-8)


def test_water_level(calibration):
    distortions = [f(calibration[0], "head").distortion for f in (key_bases, value_bases)]
    for bits in (0.5, 2.0, 6.0):
        level = water_level(distortions, bits)
        spent = np.concatenate([rates(d, level).ravel() for d in distortions])
        assert abs(spent.mean() - bits) < 1e-9
        assert sum(code_bytes(calibration[0], bits, "head")) == max(2, round(bits * 14 / 8) - 2)
        assert sum(code_bytes(calibration[0], bits, "layer")) == max(2, round(bits * 28 / 8) - 4)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_even_groups(count):
    bits = np.array([6.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.1, 0.05, 0.0, 0.0])
    groups = even_groups(bits, count)
    assert len(groups) == count
    assert sorted(np.concatenate(groups)) == list(range(8))
    spent = [bits[group].sum() for group in groups]
    # Never worse than giving the last coefficient of the richest to the poorest.
    assert max(spent) - min(spent) <= 6.0 if count > 1 else spent == [bits[:8].sum()]
    for group in groups:
        if len(group) > 1:
            assert bits[group[:-1]].sum() <= min(spent) + 1e-9


def test_more_bits_less_error_and_queries_help():
    """Against attention itself: fewer errors with more bits, and with queries than without."""
    dims = (24, 16)
    k, v, q = make(400, 50, dims=dims)
    calibration = Calibration(rows=1024, skip=0)
    for seed in range(4):
        calibration.update(0, *make(512, seed, dims=dims))

    def error(known: LayerStatistics, count: int) -> float:
        parameters = train_role(key_bases(known, "head"), known.key_rows, count)
        y = encode_product(k[0] @ parameters.forward, *parameters.codebooks)
        decoded = decode_product(y, *parameters.codebooks) @ parameters.backward + parameters.offset
        return metrics.attention_error(q[:, :, -200:], (k, v), (decoded[None], v))

    statistics = calibration[0]
    errors = [error(statistics, count) for count in (2, 4, 8)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors))
    blind = replace(statistics, query_moment=np.broadcast_to(np.eye(24), (HEADS, 24, 24)))
    assert errors[1] < 0.8 * error(blind, 4)


def test_containers_carry_the_fingerprint_only(calibration):
    method = TransformCoding(2, calibration[0])
    k, v, _ = make(40, 1)
    compressed = KVCacheCompressor(method).compress_kv(k, v)
    packed = pickle.dumps(compressed)
    assert len(packed) < compressed.nbytes + 4000
    copy: CompressedKV = pickle.loads(packed)
    assert copy.keys.method.calibration == train(calibration[0], 2, "layer").fingerprint
    for x, y in zip(
        KVCacheCompressor(method).decompress_kv(copy),
        KVCacheCompressor(method).decompress_kv(compressed),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    # Another rate with the same calibration decodes too: what is compressed knows its own.
    KVCacheCompressor(TransformCoding(3, calibration[0])).decompress_kv(copy)
    other = Calibration(rows=256, skip=0)
    other.update(0, *make(300, 9))
    with pytest.raises(CalibrationError, match=copy.keys.method.calibration[:12]):
        KVCacheCompressor(TransformCoding(2, other[0])).decompress_kv(copy)
    with pytest.raises(CalibrationError, match="decompress it with"):
        KVCacheCompressor(LowRank(2)).decompress_kv(copy)


def test_settings_round_trip_by_fingerprint(calibration):
    method = TransformCoding(1.5, calibration[0], exact=0.1)
    again = Method.from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method.detach()
    assert again.attach(method).parameters == method.parameters
    with pytest.raises(CalibrationError, match="only named"):
        again.encoded_spec(TensorSpec((HEADS, 4, DIM), "float32"), "keys")


@pytest.mark.parametrize("bits", [0, 0.2, 9, "2", None, True, float("nan")])
def test_bits_out_of_range(calibration, bits):
    with pytest.raises(SettingError, match=r"from 0\.25 to 8"):
        TransformCoding(bits, calibration[0])


def test_wrong_shapes_and_calibrations(calibration):
    compressor = KVCacheCompressor(TransformCoding(2, calibration[0]))
    k, v, _ = make(4, 0)
    with pytest.raises(SettingError, match=f"{HEADS} heads of {DIM} keys"):
        compressor.compress_kv(k[..., :-1], v)
    with pytest.raises(SettingError, match=f"{HEADS} heads of {DIM} keys"):
        compressor.compress_kv(k[:, :1], v[:, :1])
    with pytest.raises(SettingError, match="calibration must be"):
        TransformCoding(2, calibration)


class PlainRotation(RotatedQuantization):
    """Keys as they are, neither centred nor made alike."""

    def encoded_spec(self, spec, role):
        return super().encoded_spec(spec, "values")

    def encode(self, x, role, dispatch):
        return super().encode(x, "values", dispatch)

    def decode(self, payload, spec, role, dispatch):
        return super().decode(payload, spec, "values", dispatch)


def test_own_moments_beat_a_random_rotation():
    """Where components differ in size; bases not counted, which a long sequence pays for."""
    k, v, q = make(3000, 3, dims=(24, 16))

    def measure(method):
        compressor = KVCacheCompressor(method)
        compressed = compressor.compress_kv(k, v)
        restored = compressor.decompress_kv(compressed)
        error = metrics.attention_error(q[:, :, -100:], (k, v), restored)
        return compressed.bits_per_value, error

    (own_bits, own), (rotated_bits, rotated) = map(measure, (TransformCoding(3), PlainRotation(3)))
    assert own_bits < rotated_bits + 0.1
    assert own < 0.6 * rotated
    assert all(
        measure(TransformCoding(more))[1] < 0.7 * measure(TransformCoding(bits))[1]
        for bits, more in ((2, 3), (3, 4))
    )


@pytest.fixture(scope="module")
def both():
    """Two layers; the keys of the second matter more."""
    both = Calibration(rows=1024, skip=0)
    for seed in range(4):
        k, v, q = make(512, seed)
        both.update(0, k, v, q)
        both.update(1, 16 * k, v, q)
    return both


def test_plan_spreads_bits(both):
    """A layer whose keys matter more gets more; budget and bits mean the same."""
    compressors = plan(both, bits=3, exact=0.0, sinks=4)
    low, high = (compressors[i].method.bits for i in (0, 1))
    assert low + 1 < high
    assert abs((low + high) / 2 - 3) < 0.05
    assert compressors[0].sinks == 4
    values = 2 * HEADS * (DIM + VALUE_DIM)
    budget = plan(both, budget_bytes=values * 3 * 100 // 8, tokens=100, exact=0.0, sinks=4)
    assert [c.method.bits for c in budget.values()] == [c.method.bits for c in compressors.values()]
    exact = plan(both, bits=3, exact=0.02)
    k = np.zeros((1, HEADS, 1000, DIM), "float16")
    v = np.zeros((1, HEADS, 1000, VALUE_DIM), "float16")
    for planned in (compressors, exact):
        sizes = [c.compress_kv(k, v).coded_bits_per_value for c in planned.values()]
        assert abs(np.mean(sizes) - 3) < 8 / (DIM + VALUE_DIM)  # to whole bytes a head
    for wrong in ({}, {"bits": 2, "tokens": 5}, {"budget_bytes": 5}):
        with pytest.raises(SettingError, match="either bits, or budget_bytes and tokens"):
            plan(both, **wrong)
    with pytest.raises(SettingError, match="exact"):
        plan(both, bits=2, exact=2)


def test_plan_file(both, tmp_path):
    """What was planned decodes by its file alone, and by nothing else."""
    planned = plan(both, bits=2, exact=0.01, sinks=2, window=5)
    planned.save(tmp_path / "a.plan")
    again = Plan.load(tmp_path / "a.plan", backend="generic")
    assert list(again) == [0, 1]
    assert 2 not in again
    assert again[0].backend == "generic"
    k, v, _ = make(50, 8)
    for layer in again:
        assert again[layer].method.parameters == planned[layer].method.parameters
        assert (again[layer].sinks, again[layer].window) == (2, 5)
        compressed = planned[layer].compress_kv(k, v)
        for x, y in zip(
            planned[layer].decompress_kv(compressed),
            again[layer].decompress_kv(compressed),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    with pytest.raises(CalibrationError, match="not with"):
        again[0].decompress_kv(compressed)
    with pytest.raises(UnknownLayer, match=r"layers \[0, 1\], not 2"):
        again[2]
    with pytest.raises(SettingError, match=r"trained for .* bits"):
        replace(again[0].method, bits=7)


def test_damaged_plans(both, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "a.plan"
    plan(both, bits=2).save(path)
    arrays = load_file(path)
    both.save(tmp_path / "calibration")
    (tmp_path / "text").write_text("no plan")
    layers = {"0": {"bits": 2, "exact": 0, "scope": "layer", "options": {"sinks": -1}}}
    metadata = {"format": FORMAT, "facts": json.dumps({"layers": layers})}
    save_file({}, tmp_path / "empty", metadata)
    save_file(arrays, tmp_path / "wrong", metadata)
    for name in ("calibration", "text", "empty", "wrong"):
        with pytest.raises(CalibrationError, match="is not a plan"):
            Plan.load(tmp_path / name)
    with pytest.raises(CalibrationError, match="nothing to save"):
        Plan({0: KVCacheCompressor(TransformCoding(2))}).save(tmp_path / "b")


def _dtype(name: str):
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)
