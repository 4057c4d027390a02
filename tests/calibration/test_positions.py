"""Keys before RoPE: statistics, and what is coded with them, hold at all positions."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from kvcompress import Calibration, KVCacheCompressor, Plan, RoPE, TransformCoding, plan
from kvcompress.calibration import distances
from kvcompress.calibration.distances import moment_before_rope
from kvcompress.calibration.training import key_bases
from kvcompress.errors import CalibrationError, DTypeError, SettingError, ShapeError
from kvcompress.evaluation import metrics
from kvcompress.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    YarnScaling,
)

HEADS, GROUP, DIM = 2, 2, 16

SCALINGS = {
    "none": None,
    "linear": LinearScaling(4.0),
    "proportional": ProportionalScaling(0.5, 2.0),
    "dynamic": DynamicScaling(2.0, 2048),
    "yarn": YarnScaling(4.0, 4096),
    "llama3": Llama3Scaling(8.0, 8192),
    "longrope": LongRopeScaling((1.0,) * 8, (1.5, 2, 3, 4, 5, 6, 7, 8.0), 4096, 1.2),
}
ROPES = {name: RoPE(DIM, 5e5, scaling=scaling) for name, scaling in SCALINGS.items()}
ROPES |= {
    "interleaved": RoPE(DIM, interleaved=True),
    "partial": RoPE(8, head_dim=DIM, scaling=YarnScaling(8.0, 2048)),
}


def make(tokens: int, seed: int, batch: int = 1):
    """Keys and queries before RoPE, of a large mean and correlated channels; and values."""
    rng, model = np.random.default_rng(seed), np.random.default_rng(7)
    shape, falling = (batch, HEADS, tokens, DIM), 0.8 ** np.arange(DIM)
    k = rng.standard_normal(shape) * falling @ model.standard_normal((HEADS, DIM, DIM))
    k += 4 * model.standard_normal((HEADS, 1, DIM))
    v = rng.standard_normal(shape) * falling @ model.standard_normal((HEADS, DIM, DIM)) + 0.3
    readers = model.standard_normal((HEADS * GROUP, DIM, DIM)) * falling[::-1]
    q = rng.standard_normal((batch, HEADS * GROUP, tokens, DIM)) @ readers / 4
    return tuple(x.astype("float32") for x in (k, v, q))


def rotated(x, rope: RoPE, positions):
    return rope.apply(x, positions, seq_len=int(positions.max()) + 1)


def calibrate(rope: RoPE | None, start: int = 0, length: int = 512) -> Calibration:
    """Of sequences of a length, at positions from `start` on."""
    calibration = Calibration(rows=1024, skip=0)
    positions = np.arange(start, start + length)
    for seed in range(2048 // length):
        k, v, q = make(length, seed)
        if rope is not None:
            k, q = (rotated(x, rope, positions) for x in (k, q))
        calibration.update(0, k, v, q, rope=rope, positions=rope and positions)
    return calibration


def test_plans_keep_what_the_calibration_skipped():
    made = Calibration(rows=256, skip=3)
    made.update(0, *make(300, 0))
    assert plan(made, bits=2)[0].sinks == 3
    assert plan(made, bits=2, sinks=1)[0].sinks == 1


def relative_error(x, y) -> float:
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


@pytest.fixture(scope="module")
def rope() -> RoPE:
    return RoPE(DIM, 1e5)


@pytest.fixture(scope="module")
def method(rope) -> TransformCoding:
    return TransformCoding(3, calibrate(rope)[0], exact=0.0)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_moment_against_all_distances(rope, monkeypatch):
    """Mean square logits of one error, distance by distance, in float64."""
    monkeypatch.setattr(distances, "OCTAVES", 12)
    rng = np.random.default_rng(0)
    queries, error = rng.standard_normal((5, DIM)), rng.standard_normal(DIM)
    angle = np.arange(4096)[:, None] * rope.frequencies(4096).astype(np.float64)

    def turned(x):
        """``[distances, ..., head_dim]``, with the magnitude, as models rotate."""
        half, pairs = rope.dim // 2, x[..., : rope.dim]
        pairs = pairs.reshape(*x.shape[:-1], *((half, 2) if rope.interleaved else (2, half)))
        axis = -1 if rope.interleaved else -2
        a, b = (np.take(pairs, i, axis=axis) for i in (0, 1))
        cos, sin = (f(angle)[:, None] * rope.magnitude for f in (np.cos, np.sin))
        parts = a * cos - b * sin, b * cos + a * sin
        whole = np.stack(parts, axis=axis).reshape(len(angle), *x.shape[:-1], rope.dim)
        rest = np.broadcast_to(x[..., rope.dim :], (*whole.shape[:-1], DIM - rope.dim))
        return np.concatenate([whole, rest], axis=-1)

    key = turned(error[None])[0, 0]  # at position 0
    squares = ((turned(queries) @ key) ** 2).mean(1)
    octaves = [squares[:1], *(squares[2**i : 2 ** (i + 1)] for i in range(12))]
    expected = np.mean([octave.mean() for octave in octaves])
    moment = moment_before_rope(queries.T @ queries / 5, rope)
    np.testing.assert_allclose(error @ moment @ error, expected, rtol=1e-9)


@pytest.mark.parametrize("start", [0, 5000, 131072 - 512])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_statistics_do_not_depend_on_positions(rope, start):
    here, plain = calibrate(rope, start)[0], calibrate(None)[0]
    for name in ("key_mean", "key_covariance", "query_moment"):
        x, y = getattr(plain, name), getattr(here, name)
        np.testing.assert_allclose(y, x, atol=1e-5 * np.abs(x).max())
    np.testing.assert_allclose(here.key_rows, plain.key_rows, rtol=2e-3, atol=2e-3)
    assert here.rope == rope
    assert here != replace(here, rope=None)


@pytest.mark.parametrize("name", ROPES)
def test_errors_do_not_depend_on_positions(xp, name):
    """Keys of the calibrated law anywhere, by a calibration of short sequences."""
    rope = ROPES[name]
    compressor = KVCacheCompressor(TransformCoding(3, calibrate(rope, length=256)[0]), sinks=2)
    k, v, _ = make(300, 99)
    errors = []
    for start in (0, 3000, 131072 - 300):
        turned = rotated(k, rope, np.arange(start, start + 300))
        compressed = compressor.compress_kv(xp.asarray(turned), xp.asarray(v), positions=start)
        assert compressed.nbytes == compressor.estimate_size(k.shape, v.shape, dtype="float32")
        restored = xp.numpy(compressor.decompress_kv(compressed)[0])
        np.testing.assert_array_equal(restored[:, :, :2], turned[:, :, :2])
        errors.append(relative_error(turned, restored))
    np.testing.assert_allclose(errors, errors[0], rtol=0.01)
    assert errors[0] < 0.1


def test_blocks_by_themselves(xp, method, rope):
    """A block knows where it starts; codes are those of the whole, traced starts too."""
    compressor = KVCacheCompressor(method)
    k, v, _ = make(96, 5)
    k = rotated(k, rope, np.arange(700, 796))
    whole = compressor.compress_kv(xp.asarray(k), xp.asarray(v), positions=700)
    x = xp.numpy(compressor.decompress_kv(whole)[0])

    def run(k, v, start):
        return compressor.compress_kv(k, v, positions=start)

    for at in (0, 32, 64):
        parts = (xp.asarray(a[:, :, at : at + 32]) for a in (k, v))
        block = xp.run(run, *parts, xp.asarray(np.asarray(700 + at, dtype="int32")))
        codes = xp.numpy(block.keys.payload["codes"])
        other = xp.numpy(whole.keys.payload["codes"])[:, at : at + 32]
        assert np.mean(codes != other) < 1e-3
        restored = xp.numpy(xp.run(compressor.decompress_kv, block)[0])
        assert relative_error(x[:, :, at : at + 32], restored) < 1e-2


def test_positions_that_do_not_follow(xp, method, rope):
    compressor = KVCacheCompressor(method, sinks=3, window=2)
    positions = np.sort(np.random.default_rng(0).choice(9000, 50, replace=False)).astype("int32")
    k, v, _ = make(50, 6)
    turned = rotated(k, rope, positions)
    arrays = xp.asarray(turned), xp.asarray(v)
    one = compressor.compress_kv(*arrays, positions=xp.asarray(positions))
    assert one.keys.positions.places.shape == (45,)
    cache = compressor.compress_cache(*([x] for x in arrays), positions=xp.asarray(positions))
    straight = compressor.compress_kv(xp.asarray(rotated(k, rope, np.arange(50))), arrays[1])
    assert one.nbytes == straight.nbytes + 4 * 44
    x = rope.undo(xp.numpy(compressor.decompress_kv(one)[0]), positions)
    y = rope.undo(xp.numpy(compressor.decompress_kv(straight)[0]), np.arange(50))
    assert relative_error(y, x) < 1e-2
    # A cache keeps no sinks where it does not hold the first token.
    assert cache.parts[0].sinks == 0
    x = rope.undo(xp.numpy(compressor.decompress_cache(cache)[0][0]), positions)
    assert relative_error(y, x) < 0.1
    for wrong, error in (
        (positions[:9], ShapeError),
        (positions / 2, DTypeError),
        (positions - 1000, SettingError),
        (positions + 2**30, SettingError),
    ):
        with pytest.raises(error, match="positions must be"):
            compressor.compress_kv(*arrays, positions=xp.asarray(wrong))
        with pytest.raises(error, match="positions must be"):
            compressor.compress_cache(*([x] for x in arrays), positions=xp.asarray(wrong))
    for start in (-1, 2**31, 1.5, True, "3"):
        with pytest.raises(SettingError, match="positions must be an integer from 0"):
            compressor.compress_kv(*arrays, positions=start)


def test_scaling_that_follows_the_length():
    """Frequencies are those of the sequence that was compressed, when it is restored too."""
    rope = ROPES["longrope"]
    compressor = KVCacheCompressor(TransformCoding(3, calibrate(rope)[0]))
    k, v, _ = make(100, 3)
    for start, length in ((0, 100), (4000, 4100)):
        turned = rope.apply(k, np.arange(start, start + 100), seq_len=length)
        compressed = compressor.compress_kv(turned, v, positions=start)
        assert compressed.keys.positions.seq_len == length
        assert relative_error(turned, compressor.decompress_kv(compressed)[0]) < 0.1


def test_a_traced_start_needs_frequencies_that_do_not_follow_the_length():
    jax = pytest.importorskip("jax")
    compressor = KVCacheCompressor(TransformCoding(3, calibrate(ROPES["dynamic"])[0]))
    k, v, _ = map(jax.numpy.asarray, make(20, 3))
    with pytest.raises(SettingError, match="does not trace"):
        jax.jit(lambda k, v, start: compressor.compress_kv(k, v, positions=start))(k, v, 7)


def test_calibrations_of_short_sequences_do_as_well(rope):
    """What is coded at the end of a text, by what a calibration saw at its beginning only."""
    k, v, q = make(400, 50)
    positions = np.arange(6000, 6400)
    k, q = (rotated(x, rope, positions) for x in (k, q))

    def error(calibration: Calibration) -> float:
        compressor = KVCacheCompressor(TransformCoding(3, calibration[0], exact=0.0))
        x, _ = compressor.decompress_kv(compressor.compress_kv(k, v, positions=6000))
        return metrics.attention_error(q[:, :, -100:], (k, v), (x, v))

    short, long = error(calibrate(rope)), error(calibrate(rope, 5800))
    assert short < 1.05 * long


def test_files_carry_the_rope(tmp_path, rope):
    calibration = calibrate(rope)
    calibration.save(tmp_path / "a.cal")
    again = Calibration.load(tmp_path / "a.cal")
    assert (again.fingerprint, again[0]) == (calibration.fingerprint, calibration[0])
    compressors = plan(again, bits=2)
    compressors.save(tmp_path / "a.plan")
    loaded = Plan.load(tmp_path / "a.plan")
    assert loaded[0].method.rope == rope
    assert loaded[0].method.parameters == compressors[0].method.parameters
    k, v, _ = make(40, 1)
    compressed = compressors.compress_cache([k], [v], positions=np.arange(70, 110))
    copy = pickle.loads(pickle.dumps(compressed)).to(np)
    x, y = (c.decompress_cache(z)[0][0] for c, z in ((compressors, compressed), (loaded, copy)))
    np.testing.assert_array_equal(x, y)
    unrotated = replace(loaded[0].method.parameters, rope=None)
    assert unrotated != loaded[0].method.parameters


def test_ropes_do_not_mix(rope):
    calibration = calibrate(rope)
    before = calibration.fingerprint
    k, v, q = make(20, 0)
    for other in (None, RoPE(DIM, 1e6)):
        with pytest.raises(CalibrationError, match="has statistics of keys with rope="):
            calibration.update(0, k, v, q, rope=other)
    with pytest.raises(ShapeError, match="same tokens"):
        calibration.update(0, k, v, q[:, :, :5], rope=rope)
    with pytest.raises(SettingError, match="rope must be a RoPE"):
        calibration.update(1, k, v, q, rope="default")
    with pytest.raises(ShapeError, match="rope is for head_dim"):
        calibration.update(1, k, v, q, rope=RoPE(DIM + 2))
    assert calibration.fingerprint == before
    assert calibration.layers == (0,)
    other = Calibration(rows=1024, skip=0, seed=1)
    other.update(0, k, v, q)
    with pytest.raises(CalibrationError, match="has statistics of keys with rope="):
        calibration.merge(other)
    other = Calibration(rows=1024, skip=0, seed=1)
    other.update(0, k, v, q, rope=rope)
    assert calibration.merge(other)[0].rope == rope


def test_metric_is_of_what_the_queries_see(rope):
    """Not of the queries before RoPE, which no key meets."""
    statistics = calibrate(rope)[0]
    bases = key_bases(statistics, "head")
    seen = np.einsum("hic,hjc->hij", bases.forward, bases.forward)
    expected = moment_before_rope(statistics.query_moment, rope)
    ridge = 1e-3 * np.trace(expected, axis1=1, axis2=2) / DIM
    np.testing.assert_allclose(seen, expected + ridge[:, None, None] * np.eye(DIM), rtol=1e-9)
