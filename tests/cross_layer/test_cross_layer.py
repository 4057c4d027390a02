"""Layers compressed together: round trips, parts of them, bytes, quality, errors, files."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import (
    CrossLayerCalibration,
    CrossLayerTransform,
    GroupQuantization,
    KVCacheCompressor,
    RoPE,
    RotatedQuantization,
)
from kvcompress.cross_layer import (
    CrossLayerParameters,
    LayerGroup,
    LayerGroupStatistics,
    LayerShape,
    fit_basis,
    train_layer_group,
)
from kvcompress.cross_layer.calibration import layer_groups
from kvcompress.cross_layer.metric import DAMPED
from kvcompress.cross_layer.parameters import store_basis
from kvcompress.cross_layer.training import train_layer_groups
from kvcompress.cross_layer.transform import BLOCK
from kvcompress.errors import (
    CalibrationError,
    CodingError,
    DTypeError,
    LayoutError,
    SettingError,
    ShapeError,
    UnknownLayer,
)
from kvcompress.files import Facts
from kvcompress.rope.scaling import DynamicScaling, LongRopeScaling, YarnScaling

LAYERS, HEADS, DIM, VALUE_DIM = 3, 2, 8, 6
GROUP = LayerGroup(
    (0, 1, 2),
    (
        LayerShape(HEADS, DIM, VALUE_DIM, RoPE(DIM, 100.0)),
        LayerShape(HEADS, DIM, VALUE_DIM, RoPE(4, 50.0, interleaved=True, head_dim=DIM)),
        LayerShape(HEADS, DIM, VALUE_DIM),
    ),
)


def make(tokens: int, seed: int, batch: int = 1, *, first: int = 0, group: LayerGroup = GROUP):
    """Keys and values that are noisy images of a small hidden state, as layers are."""
    rng, known = np.random.default_rng(seed), np.random.default_rng(7)
    mix = known.standard_normal((8, group.width))
    hidden = rng.standard_normal((batch * tokens, 8)) * 0.7 ** np.arange(8)
    rows = hidden @ mix + 0.05 * rng.standard_normal((batch * tokens, group.width))
    rows = rows.astype("float32")
    place = first + np.arange(tokens)
    pairs = [
        group.split(rows[:, columns], place, batch=batch, layer=i)
        for i, columns in enumerate(group.columns)
    ]
    keys, values = ([np.asarray(x, "float32") for x in xs] for xs in zip(*pairs, strict=True))
    return keys, values


@pytest.fixture(scope="module")
def statistics() -> LayerGroupStatistics:
    statistics = LayerGroupStatistics(GROUP, rows=600, skip=0)
    for seed in range(3):
        statistics.update(*make(400, seed))
    return statistics


@pytest.fixture(scope="module")
def parameters(statistics) -> CrossLayerParameters:
    return train_layer_group(statistics, 1.5)


def errors(original, restored):
    return [
        float(np.linalg.norm(np.asarray(y, "float64") - x) / np.linalg.norm(x))
        for x, y in zip(original, restored, strict=True)
    ]


def test_round_trip_in_every_library(xp, parameters):
    """In and out in the caller's library and dtype, close to what went in."""
    if xp.name == "jax-jit":
        pytest.skip("sizes follow from the data")
    compressor = KVCacheCompressor(CrossLayerTransform(parameters), sinks=2, window=5)
    keys, values = make(40, 99, batch=2)
    for dtype in xp.few(xp.dtypes):
        ks, vs = ([xp.asarray(_cast(x, dtype)) for x in xs] for xs in (keys, values))
        compressed = compressor.compress_cache(ks, vs)
        restored = compressor.decompress_cache(compressed)
        for xs, ys in zip((ks, vs), restored, strict=True):
            for x, y in zip(xs, ys, strict=True):
                assert xp.owns(y)
                assert y.dtype == x.dtype
                assert y.shape == x.shape
                exact = [0, 1, -5, -1]
                for i in exact:
                    np.testing.assert_array_equal(xp.numpy(x)[:, :, i], xp.numpy(y)[:, :, i])
            hosts = [xp.numpy(y).astype("float64") for y in ys]
            assert max(errors([xp.numpy(x).astype("float64") for x in xs], hosts)) < 0.2


def _cast(x, dtype):
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2),
    st.integers(0, 30),
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(0, 30),
    st.integers(0, 30),
    st.permutations([0, 1, 2]),
    st.integers(0, 3),
)
def test_parts_are_those_of_the_whole(
    parameters, seed, batch, tokens, sinks, window, start, stop, layers, count
):
    compressor = KVCacheCompressor(CrossLayerTransform(parameters), sinks=sinks, window=window)
    keys, values = make(tokens, seed, batch)
    compressed = compressor.compress_cache(keys, values)
    whole = compressor.decompress_cache(compressed)
    some, cut = layers[:count], slice(start, stop)
    part = compressor.decompress_cache(compressed, layers=some, tokens=cut)
    for xs, ys in zip(whole, part, strict=True):
        for layer, y in zip(some, ys, strict=True):
            np.testing.assert_allclose(y, xs[layer][:, :, cut], rtol=1e-4, atol=1e-5)


def test_parts_across_blocks(parameters):
    compressor = KVCacheCompressor(CrossLayerTransform(parameters), sinks=4, window=7)
    keys, values = make(2 * BLOCK + 50, 5)
    compressed = compressor.compress_cache(keys, values)
    whole, _ = compressor.decompress_cache(compressed)
    for cut in (slice(BLOCK - 3, BLOCK + 20), slice(-20, None), slice(2, 6)):
        part, _ = compressor.decompress_cache(compressed, layers=[1], tokens=cut)
        np.testing.assert_allclose(part[0], whole[1][:, :, cut], rtol=1e-4, atol=1e-5)


def test_memory():
    """Beyond what goes in and comes out, four blocks of rows: the same for any length."""
    group = LayerGroup((0, 1), (LayerShape(8, 16, 16, RoPE(16, 100.0)),) * 2)
    known = LayerGroupStatistics(group, rows=300, skip=0)
    known.update(*make(600, 1, group=group))
    compressor = KVCacheCompressor(CrossLayerTransform(train_layer_group(known, 0.3)))
    block = 4 * BLOCK * group.width
    keys, values = ([x.astype("float16") for x in xs] for xs in make(20 * BLOCK, 2, group=group))
    compressor.decompress_cache(compressor.compress_cache(keys, values))
    tracemalloc.start()
    try:
        compressed = compressor.compress_cache(keys, values)
        assert tracemalloc.get_traced_memory()[1] - compressed.nbytes < 4 * block
        tracemalloc.reset_peak()
        restored = compressor.decompress_cache(compressed)
        peak = tracemalloc.get_traced_memory()[1] - compressed.nbytes
        layer = restored[0][0].nbytes + restored[1][0].nbytes
        assert peak - sum(x.nbytes for xs in restored for x in xs) - layer < 4 * block
    finally:
        tracemalloc.stop()


def test_bytes(parameters):
    keys, values = make(300, 11, batch=2)
    compressed = KVCacheCompressor(CrossLayerTransform(parameters), sinks=4).compress_cache(
        [k.astype("float16") for k in keys], [v.astype("float16") for v in values]
    )
    (part,) = compressed.parts
    coded = sum(x.nbytes for x in part.payload.values())
    exact = sum(x.nbytes for pair in part.exact for x in pair)
    assert compressed.nbytes == coded + exact + 4 == len(_bytes(compressed)) + 4  # a checksum
    assert compressed.original_nbytes == sum(2 * x.size for x in (*keys, *values))
    method = CrossLayerTransform(parameters)
    assert coded <= method.max_nbytes(0, 2, 296)
    compressor = KVCacheCompressor(method, sinks=4)
    bound = compressor.estimate_size([k.shape for k in keys], [v.shape for v in values])
    assert compressed.nbytes <= bound
    with pytest.raises(SettingError, match="one shape for every layer"):
        compressor.estimate_size(keys[0].shape)
    with pytest.raises(SettingError, match="layers"):
        compressor.estimate_size([keys[0].shape])
    assert compressed.coded_bits_per_value == pytest.approx(
        8 * (coded + 4) / (2 * 296 * GROUP.num_values)
    )
    # 84 values a token here: its state and length, 6 bytes, are half a bit a value by themselves.
    overhead = 48 / GROUP.num_values
    assert compressed.coded_bits_per_value == pytest.approx(1.5 + overhead, rel=0.05)
    assert compressed.ratio == compressed.original_nbytes / compressed.nbytes


def _bytes(compressed) -> bytes:
    """Every array of a container, found by walking it."""
    found = b""

    def walk(x):
        nonlocal found
        if isinstance(x, np.ndarray):
            found += x.tobytes()
        elif isinstance(x, dict):
            walk(list(x.values()))
        elif isinstance(x, list | tuple):
            for item in x:
                walk(item)
        elif hasattr(x, "__dataclass_fields__"):
            walk([getattr(x, name) for name in x.__dataclass_fields__])

    walk(compressed)
    return found


def test_better_than_one_by_one(parameters):
    """Layers that are images of one state cost less together, at the same error."""
    keys, values = make(600, 12)
    together = KVCacheCompressor(CrossLayerTransform(parameters))
    alone = KVCacheCompressor(RotatedQuantization(bits=3))
    size, error = [], []
    for compressor in (together, alone):
        compressed = compressor.compress_cache(keys, values)
        restored = compressor.decompress_cache(compressed)
        size.append(compressed.coded_bits_per_value)
        error.append(np.mean(errors([*keys, *values], [*restored[0], *restored[1]])))
    assert size[0] < 0.7 * size[1]
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("tokens", [60, 200])
@pytest.mark.parametrize("kind", ["loud", "zeros", "constant", "other", "huge"])
def test_tokens_no_calibration_foresaw(parameters, kind, tokens):
    """Quality holds, at whatever rate it takes, with a mean of the sequence and without."""
    rng = np.random.default_rng(1)
    keys, values = make(tokens, 13)
    for xs in (keys, values):
        for x in xs:
            x[:, :, 20:40] = {
                "loud": 30 * x[:, :, 20:40],
                "zeros": 0 * x[:, :, 20:40],
                "constant": 0 * x[:, :, 20:40] + 2,
                "other": rng.standard_normal(x[:, :, 20:40].shape),
                "huge": rng.standard_normal(x[:, :, 20:40].shape) * 1e30,
            }[kind]
    compressor = KVCacheCompressor(CrossLayerTransform(parameters))
    restored = compressor.decompress_cache(compressor.compress_cache(keys, values))
    assert all(np.all(np.isfinite(x)) for xs in restored for x in xs)
    for xs, ys in zip((keys, values), restored, strict=True):
        for x, y in zip(xs, ys, strict=True):
            odd, found = (z[:, :, 20:40].astype("float64") for z in (x, y))
            # The step suits tokens of size one; errors of values are relative to their norms.
            size = 1 if xs is keys and kind != "huge" else np.sqrt(np.mean(odd**2))
            assert np.sqrt(np.mean((found - odd) ** 2)) < 0.4 * size + 0.01
            rest = np.delete(y.astype("float64") - x, np.arange(20, 40), axis=2)
            assert rest.std() < 0.2 * x[:, :, :20].std()


def test_positions(parameters):
    """RoPE is undone where the tokens stood; other positions are kept, and counted."""
    compressor = KVCacheCompressor(CrossLayerTransform(parameters), sinks=4)
    keys, values = make(200, 14, first=1000)
    bits = []
    for place in (None, np.arange(1000, 1200)):
        compressed = compressor.compress_cache(keys, values, positions=place)
        restored, _ = compressor.decompress_cache(compressed)
        assert max(errors(keys, restored)) < 0.25
        bits.append(compressed.coded_bits_per_value)
    assert bits[1] < bits[0]
    assert compressed.parts[0].sinks == 0
    order = np.random.default_rng(0).permutation(200)
    shuffled = [[x[:, :, order] for x in xs] for xs in (keys, values)]
    compressed = compressor.compress_cache(*shuffled, positions=1000 + order)
    assert compressed.parts[0].positions.nbytes == 800
    part, _ = compressor.decompress_cache(compressed, tokens=slice(50, 90))
    assert max(errors([k[:, :, 50:90] for k in shuffled[0]], part)) < 0.25


def test_groups_of_different_tokens():
    """Layers with a sliding window are a group of their own; they lost the sinks."""
    shapes = GROUP.shapes
    full, sliding = LayerGroup((1,), shapes[1:2]), LayerGroup((0, 2), (shapes[0], shapes[2]))
    groups = []
    for group in (full, sliding):
        known = LayerGroupStatistics(group, rows=300, skip=0)
        known.update(*make(600, 1, group=group))
        groups.append(train_layer_group(known, 2.0))
    compressor = KVCacheCompressor(CrossLayerTransform(tuple(groups)), sinks=3, window=8)
    (k1,), (v1,) = make(100, 2, group=full)
    (k0, k2), (v0, v2) = make(60, 2, first=40, group=sliding)
    compressed = compressor.compress_cache([k0, k1, k2], [v0, v1, v2])
    assert [part.sinks for part in compressed.parts] == [3, 0]
    keys, values = compressor.decompress_cache(compressed)
    assert max(errors([k0, k1, k2, v0, v1, v2], [*keys, *values])) < 0.25


def test_other_methods_code_layer_by_layer():
    """Every other method does the layers one by one."""
    keys, values = make(50, 3)
    keys[1], values[1] = keys[1][:, :, -20:], values[1][:, :, -20:]
    compressor = KVCacheCompressor(GroupQuantization(4, 2), sinks=4, window=4)
    compressed = compressor.compress_cache(keys, values)
    single = [replace(compressor, sinks=0 if i == 1 else 4) for i in range(3)]
    expected = [c.compress_kv(k, v) for c, k, v in zip(single, keys, values, strict=True)]
    assert compressed.nbytes == sum(x.nbytes for x in expected)
    restored = compressor.decompress_cache(compressed, layers=[1], tokens=slice(3, 9))
    k, v = compressor.decompress_kv(expected[1])
    np.testing.assert_array_equal(restored[0][0], k[:, :, 3:9])
    np.testing.assert_array_equal(restored[1][0], v[:, :, 3:9])


def test_caches_move_between_libraries(xp, parameters):
    """`CompressedCache.to` keeps every count, and what is restored."""
    if xp.name == "jax-jit":
        pytest.skip("sizes follow from the data")
    keys, values = make(30, 12)
    places = np.arange(30) + 3 * (np.arange(30) > 20)
    for method in (CrossLayerTransform(parameters), GroupQuantization(4, 2)):
        compressor = KVCacheCompressor(method, sinks=2, window=3)
        compressed = compressor.compress_cache(keys, values, positions=places)
        moved = compressed.to(xp.module)
        for name in ("nbytes", "coded_nbytes", "original_nbytes", "num_values", "num_coded"):
            assert getattr(moved, name) == getattr(compressed, name)
        assert moved.bits_per_value == compressed.bits_per_value
        assert moved.num_layers == compressed.num_layers == 3
        assert str(moved.device) in repr(moved)
        restored = compressor.decompress_cache(moved)
        expected = compressor.decompress_cache(compressed)
        for xs, ys in zip(restored, expected, strict=True):
            for x, y in zip(xs, ys, strict=True):
                assert xp.owns(x)
                np.testing.assert_allclose(xp.numpy(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.library("jax")
def test_caches_are_pytrees():
    """Where the parts are, so that a whole cache goes through ``jax.jit``."""
    import jax

    keys, values = ([jax.numpy.asarray(x) for x in xs] for xs in make(30, 12))
    compressor = KVCacheCompressor(GroupQuantization(4, 2), sinks=2)
    compressed = jax.jit(compressor.compress_cache)(keys, values)
    again = jax.jit(compressor.decompress_cache)(compressed)
    expected = compressor.decompress_cache(compressor.compress_cache(keys, values))
    for xs, ys in zip(again, expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_files(tmp_path, parameters):
    method = CrossLayerTransform(parameters)
    method.save(tmp_path / "c")
    assert CrossLayerTransform.load(tmp_path / "c") == method == pickle.loads(pickle.dumps(method))
    calibration = CrossLayerCalibration((GROUP,), rows=256, skip=0)
    calibration.update(*make(400, 0))
    calibration.provenance = {"text": "x"}
    calibration.save(tmp_path / "s")
    again = CrossLayerCalibration.load(tmp_path / "s")
    assert again.fingerprint == calibration.fingerprint
    assert again.provenance == calibration.provenance
    assert again.train(1.5).groups == calibration.train(1.5).groups
    for known in (again, calibration):
        known.update(*make(50, 1))
    assert again.tokens == 450
    assert again.fingerprint == calibration.fingerprint
    with pytest.raises(UnknownLayer):
        again.update([], [])
    for load in (CrossLayerCalibration.load, CrossLayerTransform.load):
        (tmp_path / "bad").write_bytes(b"no")
        with pytest.raises(CalibrationError):
            load(tmp_path / "bad")
    with pytest.raises(CalibrationError, match="format"):
        CrossLayerTransform.load(tmp_path / "s")


def test_files_of_ropes(tmp_path):
    """Every scaling of RoPE comes back from a file."""
    long = LongRopeScaling((1.0, 2.0), (3.0, 4.0), 64)
    ropes = [RoPE(4, scaling=s) for s in (YarnScaling(4.0, 64), DynamicScaling(2.0, 64), long)]
    group = LayerGroup((0, 1, 2), tuple(LayerShape(1, 4, 2, rope) for rope in ropes))
    statistics = LayerGroupStatistics(group, rows=256, skip=0)
    rng = np.random.default_rng(0)
    statistics._rows = rng.standard_normal((256, group.width)).astype("f2")
    statistics._tags, statistics.tokens = rng.random(256), 256
    statistics._moment = statistics._rows.T.astype("f4") @ statistics._rows.astype("f4")
    CrossLayerTransform(train_layer_group(statistics, 1.0)).save(tmp_path / "c")
    assert CrossLayerTransform.load(tmp_path / "c").groups[0].group == group


def test_layer_groups_of_a_model():
    """Layers with other windows hold other tokens; what is too wide is cut evenly."""
    shape = LayerShape(2, 4, 4)
    layers = {i: (shape, 8 if i % 3 else None) for i in range(9)}
    assert [s.layers for s in layer_groups(layers)] == [(0, 3, 6), (1, 2, 4, 5, 7, 8)]
    cut = layer_groups(layers, max_width=4 * shape.width)
    assert [s.layers for s in cut] == [(0, 3, 6), (1, 2, 4), (5, 7, 8)]
    with pytest.raises(SettingError, match="max_width"):
        layer_groups(layers, max_width=17)


@given(st.integers(1, 30), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_stored_bases(width, components, seed):
    """Half floats, bytes and nibbles are as close as they promise; rows keep their norms."""
    rng = np.random.default_rng(seed)
    components = min(components, width)
    vectors = np.linalg.qr(rng.standard_normal((width, width)))[0][:components].astype("float32")
    sizes = np.sort(np.exp(2 * rng.standard_normal(components)))[::-1]
    group = LayerGroup((0,), (LayerShape(1, width, 1),))
    vectors = np.concatenate([vectors, np.zeros((components, 2), "float32")], axis=1)
    known = store_basis(vectors, sizes)
    others = [f.name for f in fields(CrossLayerParameters) if not f.name.startswith("basis")][2:]
    parameters = CrossLayerParameters(group, 1.0, **dict.fromkeys(others, np.zeros(1)), **known)
    assert parameters.components == components
    error = np.linalg.norm(parameters.backward - vectors, axis=1)
    limit = np.where(sizes >= 8, 2e-3, np.where(sizes >= 1, 0.02 * width**0.5, 0.8))
    assert np.all(error < limit)
    np.testing.assert_allclose(np.linalg.norm(parameters.backward, axis=1), 1, rtol=1e-3)


def test_other_parameters_are_refused(statistics, parameters):
    keys, values = make(30, 4)
    compressed = KVCacheCompressor(CrossLayerTransform(parameters)).compress_cache(keys, values)
    other = train_layer_group(statistics, 2.0)
    assert other != parameters
    with pytest.raises(CalibrationError, match=parameters.fingerprint[:12]):
        KVCacheCompressor(CrossLayerTransform(other)).decompress_cache(compressed)
    with pytest.raises(CalibrationError, match="CrossLayerTransform"):
        KVCacheCompressor(GroupQuantization()).decompress_cache(compressed)
    # Any of several will do.
    moved = replace(other, group=replace(other.group, layers=(3, 4, 5)))
    both = KVCacheCompressor(CrossLayerTransform((moved, parameters)))
    assert len(both.decompress_cache(compressed)[0]) == 3


@pytest.mark.parametrize("name", ["words", "lengths", "mean_words", "mean_lengths"])
def test_damaged_payloads_are_found(parameters, name):
    keys, values = make(130, 6)
    compressor = KVCacheCompressor(CrossLayerTransform(parameters))
    compressed = compressor.compress_cache(keys, values)
    (part,) = compressed.parts
    x = part.payload[name].copy()
    x.reshape(-1)[9] ^= 0xFF
    damaged = replace(part, payload={**part.payload, name: x})
    with pytest.raises(CodingError, match="checksum"):
        compressor.decompress_cache(replace(compressed, parts=(damaged,)))
    # What has a checksum of its own, such as that of a forger, is found by the coder.
    damaged = replace(damaged, checksum=damaged.compute_checksum())
    with pytest.raises(CodingError, match="damaged"):
        compressor.decompress_cache(replace(compressed, parts=(damaged,)))


def test_every_flipped_bit_is_found(parameters):
    """In the payload, the exact tokens and the positions, one token being kept as it is."""
    keys, values = make(24, 6)
    keys[1][:, :, 9] *= 1e12
    compressor = KVCacheCompressor(CrossLayerTransform(parameters), sinks=1)
    places = np.arange(24) + (np.arange(24) > 7)
    compressed = compressor.compress_cache(keys, values, positions=places)
    (part,) = compressed.parts
    for name, x in part.payload.items():
        for bit in range(8 * x.size):
            y = x.copy()
            y.reshape(-1)[bit // 8] ^= 1 << bit % 8
            damaged = replace(part, payload={**part.payload, name: y})
            with pytest.raises(CodingError):
                compressor.decompress_cache(replace(compressed, parts=(damaged,)))
    moved = replace(part, positions=part.positions + 1)
    (k, v), *others = part.exact
    other = replace(part, exact=((k, v + 1), *others))
    for damaged in (moved, other, replace(part, sinks=0)):
        with pytest.raises(CodingError):
            compressor.decompress_cache(replace(compressed, parts=(damaged,)))


def test_errors(parameters, statistics):
    compressor = KVCacheCompressor(CrossLayerTransform(parameters))
    keys, values = make(10, 8)
    with pytest.raises(SettingError, match="compress_cache"):
        compressor.compress_kv(keys[0], values[0])
    with pytest.raises(SettingError, match="layers"):
        compressor.compress_cache(keys[:2], values[:2])
    with pytest.raises(ShapeError, match="values of 2"):
        compressor.compress_cache(keys, values[:2])
    with pytest.raises(ShapeError, match="layer 1"):
        compressor.compress_cache(
            [keys[0], keys[1][:, :1], keys[2]], [values[0], values[1][:, :1], values[2]]
        )
    halves = ([*x[:2], x[2].astype("float16")] for x in (keys, values))
    with pytest.raises(DTypeError, match="one dtype, got float32 and float16"):
        compressor.compress_cache(*halves)
    with pytest.raises(ShapeError, match="positions"):
        compressor.compress_cache(keys, values, positions=np.arange(9))
    with pytest.raises(LayoutError):
        compressor.decompress_cache(compressor)
    compressed = compressor.compress_cache(keys, values)
    with pytest.raises(UnknownLayer):
        compressor.decompress_cache(compressed, layers=[3])
    with pytest.raises(SettingError, match="slice"):
        compressor.decompress_cache(compressed, tokens=slice(0, 9, 2))
    with pytest.raises(SettingError, match="only"):
        CrossLayerTransform((parameters, parameters))
    with pytest.raises(SettingError):
        CrossLayerTransform(())
    with pytest.raises(SettingError, match="bits"):
        train_layer_group(statistics, 0)
    with pytest.raises(CalibrationError, match="256"):
        train_layer_group(LayerGroupStatistics(GROUP), 1.0)


def test_statistics_are_those_of_the_rows():
    """Means and covariance against NumPy's on all rows at once, sequence by sequence."""
    keys, values = make(700, 21, batch=2)
    statistics = LayerGroupStatistics(GROUP, rows=300, skip=5)
    statistics.update(keys, values)
    rows = GROUP.join([k[:, :, 5:] for k in keys], [v[:, :, 5:] for v in values], np.arange(5, 700))
    np.testing.assert_allclose(statistics.mean, rows.mean(0), atol=1e-5)
    within = np.concatenate([x - x.mean(0) for x in np.split(rows.astype("float64"), 2)])
    distance = np.abs(within[:, None, :8] - statistics.sample[None, :, :8].astype("float64"))
    held = np.argmin(distance.max(2), axis=0)
    np.testing.assert_allclose(within[held], statistics.sample, rtol=2e-3, atol=1e-3)
    assert len(np.unique(held)) == 300
    others = np.delete(within, held, axis=0)
    np.testing.assert_allclose(
        statistics.covariance(), others.T @ others / len(others), rtol=1e-2, atol=1e-3
    )


def test_gradients_are_those_of_the_rows():
    """By the chain rule, against finite differences of what a row stands for."""
    keys, values = make(6, 3)
    place = np.arange(6)
    rng = np.random.default_rng(0)
    of_keys, of_values = ([rng.standard_normal(x.shape) for x in xs] for xs in (keys, values))
    rows = GROUP.join(keys, values, place)
    gradients = GROUP.join_gradients(
        values, *([x.astype("float32") for x in xs] for xs in (of_keys, of_values)), place
    )

    def loss(rows):
        total = 0.0
        for i, columns in enumerate(GROUP.columns):
            k, v = GROUP.split(rows[:, columns], place, batch=1, layer=i)
            total += np.sum(of_keys[i] * k) + np.sum(of_values[i] * v)
        return total

    for at in rng.integers(0, rows.size, 60):
        there, back = rows.copy(), rows.copy()
        there.flat[at] += 0.01
        back.flat[at] -= 0.01
        slope = (loss(there) - loss(back)) / (float(there.flat[at]) - float(back.flat[at]))
        assert slope == pytest.approx(gradients.flat[at], rel=2e-2, abs=2e-3)


def test_what_matters_is_kept_better():
    """Errors go where gradients are small, in every head, and to tokens that have few."""
    rng, known = np.random.default_rng(3), LayerGroupStatistics(GROUP, rows=600, skip=0)
    loud = np.zeros(GROUP.width, bool)
    loud[GROUP.columns[1]] = True
    for seed in range(4):
        keys, values = make(400, seed)
        heavy = GROUP.join(keys, values, np.arange(400))[:, 0] > 0
        size = np.where(heavy, 6.0, 1.0)[:, None]
        by_keys, by_values = (
            [(8 if i == 1 else 1) * size * rng.standard_normal(x.shape) for i, x in enumerate(xs)]
            for xs in (keys, values)
        )
        by_values = [
            d / np.linalg.norm(v, axis=-1, keepdims=True)
            for d, v in zip(by_values, values, strict=True)
        ]
        known.update(
            keys, values, tuple([d.astype("float32") for d in ds] for ds in (by_keys, by_values))
        )
    plain = replace_gradients(known)
    errors = []
    for statistics in (known, plain):
        compressor = KVCacheCompressor(CrossLayerTransform(train_layer_group(statistics, 1.5)))
        keys, values = make(300, 50)
        compressed = compressor.compress_cache(keys, values)
        rows = GROUP.join(keys, values, np.arange(300))
        restored = GROUP.join(*compressor.decompress_cache(compressed), np.arange(300))
        heavy = rows[:, 0] > 0
        error = (restored - rows) ** 2
        errors.append(
            [
                error[:, loud].mean(),
                error[:, ~loud].mean(),
                error[heavy].mean(),
                error[~heavy].mean(),
            ]
        )
    weighed, even = errors
    assert weighed[0] / weighed[1] < 0.5 * even[0] / even[1]
    assert weighed[2] / weighed[3] < 0.7 * even[2] / even[3]


def test_layer_groups_share_one_step():
    """Spans whose errors do more get more of the bits, so that the sum is what was asked for."""
    rng = np.random.default_rng(5)
    groups = [replace(GROUP, layers=layers) for layers in ((0, 1, 2), (3, 4, 5))]
    known = [LayerGroupStatistics(group, rows=300, skip=0) for group in groups]
    for statistics, size in zip(known, (1, 30), strict=True):
        keys, values = make(800, 0)
        gradients = [[size * rng.standard_normal(x.shape) for x in xs] for xs in (keys, values)]
        single = ([x.astype("float32") for x in xs] for xs in gradients)
        statistics.update(keys, values, tuple(single))
    bases = [fit_basis(statistics, components=60) for statistics in known]
    together = CrossLayerTransform(train_layer_groups(known, 1.5, bases))
    steps = [float(parameters.step[0]) for parameters in together.groups]
    assert steps[0] == pytest.approx(30**DAMPED * steps[1], rel=0.05)
    keys, values = make(300, 9)
    compressor = KVCacheCompressor(together)
    compressed = compressor.compress_cache([*keys, *keys], [*values, *values])
    bits = [8 * part.coded_nbytes / part.num_coded for part in compressed.parts]
    assert bits[1] > bits[0] + 1
    assert np.mean(bits) == pytest.approx(1.5 + 48 / GROUP.num_values, rel=0.1)


def replace_gradients(statistics):
    """The same statistics, had no gradients been given."""
    arrays = dict(statistics.arrays)
    for name in ("gradients", "importance"):
        arrays[name] = np.zeros_like(arrays[name])
    return LayerGroupStatistics.of(Facts({**statistics.facts, "weighed": 0}, "facts"), arrays)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_all_tokens_share(parameters, batch):
    """An offset no calibration foresaw is paid for once, and kept better than any token."""
    compressor = KVCacheCompressor(CrossLayerTransform(parameters))
    keys, values = make(400, 30, batch)
    plain = compressor.compress_cache(keys, values)
    rng = np.random.default_rng(1)
    # Layer 2 has no RoPE: its keys are in the rows as they are.
    keys[2] = keys[2] + rng.standard_normal((batch, HEADS, 1, DIM)).astype("float32")
    moved = compressor.compress_cache(keys, values)
    assert moved.nbytes < plain.nbytes + 500 * batch
    restored = compressor.decompress_cache(moved)[0][2]
    error = restored.astype("float64") - keys[2]
    assert np.abs(error.mean(2)).max() < 0.25 * error.std()
    part = compressor.decompress_cache(moved, layers=[2], tokens=slice(130, 140))[0][0]
    np.testing.assert_allclose(part, restored[:, :, 130:140], rtol=1e-4, atol=1e-5)
