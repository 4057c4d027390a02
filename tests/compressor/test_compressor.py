from __future__ import annotations

import copy
import dataclasses
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import (
    CompressedKV,
    Hybrid,
    KVCacheCompressor,
    KVLayout,
    LowRank,
    VectorQuantization,
)
from kvcompress.arrays import FLOAT16_MAX
from kvcompress.compressor.validation import LARGEST
from kvcompress.errors import (
    DTypeError,
    LayoutError,
    NamespaceError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from kvcompress.testing import strategies as kvst

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
METHODS = [LowRank(3), Hybrid(8), VectorQuantization(16, vector_dim=4, exact=0.1, iterations=2)]
SHAPES = (2, 2, 21, 8), (2, 2, 21, 4)
OTHER = {LowRank(3): Hybrid(4, 2), Hybrid(8): LowRank(2)}


def kv(dtype="float32", shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        (rng.standard_normal(s) + 2 * rng.standard_normal(s[-1])).astype(DTYPES[dtype])
        for s in shapes
    )


def compress(k, v, *, compressor):
    return compressor.compress_kv(k, v) if k.ndim == 4 else compressor.compress_kv_3d(k, v)


def decompress(z, *, compressor):
    batched = z.layout is KVLayout.BATCHED
    return compressor.decompress_kv(z) if batched else compressor.decompress_kv_3d(z)


def relative_error(a, b):
    a, b = a.astype("float64"), b.astype("float64")
    return float(((a - b) ** 2).sum() / ((b - b.mean(-2, keepdims=True)) ** 2).sum())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_there_and_back(xp, method):
    compressor = KVCacheCompressor(method, 4, value_method=OTHER.get(method), sinks=2, window=3)
    if method.to_dict().get("rank") == 8:
        assert compressor.value_method == LowRank(2)
    for dtype in xp.dtypes:
        k, v = kv(dtype)
        arrays = xp.asarray(k), xp.asarray(v)
        z = xp.run(compress, *arrays, compressor=compressor)
        assert isinstance(z, CompressedKV)
        assert z.layout is KVLayout.BATCHED
        assert (z.shape, z.dtype) == ((k.shape, v.shape), dtype)
        held = [*z.keys.arrays.values(), *z.values.arrays.values()]
        assert all(map(xp.owns, held))
        assert z.nbytes == sum(xp.numpy(a).nbytes for a in held)
        assert z.nbytes == compressor.estimate_size(k.shape, v.shape, dtype=dtype)
        out = xp.run(decompress, z, compressor=compressor)
        for x, array, y in zip((k, v), arrays, out, strict=True):
            assert xp.owns(y)
            assert y.dtype == array.dtype
            assert getattr(y, "device", None) == getattr(array, "device", None)
            assert xp.numpy(array).tobytes() == x.tobytes()
            y = xp.numpy(y)
            assert y.shape == x.shape
            for part in (slice(None, 2), slice(-3, None)):  # sinks and window, bit for bit
                assert y[:, :, part].tobytes() == x[:, :, part].tobytes()
            assert 0 < relative_error(y, x) < 0.7


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_three_dimensions_are_a_batch_of_one(xp, method):
    compressor = KVCacheCompressor(method, value_method=OTHER.get(method))
    k, v = kv(shapes=((2, 21, 8), (2, 21, 4)))
    flat = xp.run(compress, xp.asarray(k), xp.asarray(v), compressor=compressor)
    batched = xp.run(compress, xp.asarray(k[None]), xp.asarray(v[None]), compressor=compressor)
    assert (flat.layout, batched.layout) == (KVLayout.UNBATCHED, KVLayout.BATCHED)
    assert flat.nbytes == batched.nbytes
    a = xp.run(decompress, flat, compressor=compressor)
    b = xp.run(decompress, batched, compressor=compressor)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(xp.numpy(x), xp.numpy(y)[0], strict=True)


@given(data=st.data())
def test_every_method_shape_and_dtype(data):
    ndim = data.draw(st.sampled_from((3, 4)))
    k, v = data.draw(kvst.kv(kvst.kv_shapes(ndim=ndim)))
    compressor = data.draw(kvst.compressors(k.shape[-1], v.shape[-1]))
    before = k.tobytes(), v.tobytes()
    z = compress(k, v, compressor=compressor)
    assert z.nbytes == compressor.estimate_size(k.shape, v.shape, dtype=z.dtype)
    for tensor in (z.keys, z.values):
        promised = tensor.method.encoded_spec(tensor.spec, tensor.role)
        for name, array in tensor.payload.items():
            assert (array.shape, array.dtype.name) == (promised[name].shape, promised[name].dtype)
        assert (tensor.exact is None) == (not compressor.sinks and not compressor.window)
    assert (k.tobytes(), v.tobytes()) == before
    for x, y in zip((k, v), decompress(z, compressor=compressor), strict=True):
        assert (y.shape, y.dtype, type(y)) == (x.shape, x.dtype, type(x))
        assert np.isfinite(y.astype("float64")).all()
        tokens = x.shape[-2]
        window = max(tokens - compressor.window, 0)
        assert y[..., : compressor.sinks, :].tobytes() == x[..., : compressor.sinks, :].tobytes()
        assert y[..., window:, :].tobytes() == x[..., window:, :].tobytes()


@pytest.mark.parametrize("shape", [(1, 2, 0, 8), (1, 2, 1, 8), (0, 2, 5, 8), (2, 0, 5, 8)])
@pytest.mark.parametrize("exact", [0, 3])
def test_empty_is_legal(xp, shape, exact):
    for method in METHODS:
        compressor = KVCacheCompressor(method, sinks=exact, window=exact)
        k, v = kv(shapes=(shape, shape))
        z = xp.run(compress, xp.asarray(k), xp.asarray(v), compressor=compressor)
        assert z.nbytes == compressor.estimate_size(shape, dtype="float32")
        for x, y in zip((k, v), xp.run(decompress, z, compressor=compressor), strict=True):
            np.testing.assert_allclose(xp.numpy(y), x, rtol=1e-5, atol=1e-5)
        assert repr(z)


def test_views_give_the_same_codes(xp):
    k, _ = kv()
    wide = np.zeros((2, 2, 42, 16), "float32")
    wide[:, :, ::2, ::2] = k
    array = xp.asarray(np.ascontiguousarray(k.transpose(0, 2, 1, 3)))
    permute = (
        xp.module.permute
        if xp.name == "torch"
        else (getattr(xp.module, "permute_dims", None) or xp.module.transpose)
    )
    for method in METHODS:
        compressor = KVCacheCompressor(method)
        whole = xp.asarray(k)
        expected = xp.run(compress, whole, whole, compressor=compressor)
        for view in (xp.asarray(wide)[:, :, ::2, ::2], permute(array, (0, 2, 1, 3))):
            z = xp.run(compress, view, view, compressor=compressor)
            for name, a in expected.keys.arrays.items():
                b = z.keys.arrays[name]
                assert xp.numpy(a).tobytes() == xp.numpy(b).tobytes(), (method, name)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quant_bits_are_the_default_of_the_methods(bits):
    k, v = kv()
    shared = KVCacheCompressor(Hybrid(4), bits).compress_kv(k, v)
    own = KVCacheCompressor(Hybrid(4, bits)).compress_kv(k, v)
    assert shared.keys.method == own.keys.method == Hybrid(4, bits)
    assert shared.nbytes == own.nbytes
    fixed = KVCacheCompressor(Hybrid(4, 5), bits).compress_kv(k, v)
    assert fixed.keys.method.quant_bits == 5


def test_any_compressor_decompresses():
    k, v = kv()
    compressor = KVCacheCompressor(Hybrid(3, 2), sinks=4)
    z = compressor.compress_kv(k, v)
    for a, b in zip(
        compressor.decompress_kv(z),
        KVCacheCompressor(LowRank(1), window=7).decompress_kv(z),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_compressors_are_values():
    a = KVCacheCompressor(
        Hybrid(8), 4, value_method=LowRank(2), sinks=4, window=128, nonfinite="saturate"
    )
    for b in (pickle.loads(pickle.dumps(a)), copy.copy(a), copy.deepcopy(a), eval(repr(a))):
        assert b == a
        assert hash(b) == hash(a)
    assert (a.method, a.quant_bits) == (Hybrid(8), 4)
    assert KVCacheCompressor(LowRank(2)).quant_bits == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.quant_bits = 8


def test_threads_get_the_same(xp):
    compressor = KVCacheCompressor(Hybrid(8, outliers=0.05), value_method=METHODS[2], sinks=1)
    inputs = [tuple(map(xp.asarray, kv(seed=s))) for s in range(4)]

    def work(pair):
        z = xp.run(compress, *pair, compressor=compressor)
        return [xp.numpy(x).tobytes() for x in xp.run(decompress, z, compressor=compressor)]

    alone = [work(pair) for pair in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, inputs * 4)) == alone * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_bits": 5}, "quant_bits must be 2, 3, 4 or 8, got 5"),
        ({"quant_bits": 4.0}, "quant_bits must be 2, 3, 4 or 8, got 4.0"),
        ({"quant_bits": True}, "quant_bits must be 2, 3, 4 or 8, got True"),
        ({"quant_bits": None}, "quant_bits must be 2, 3, 4 or 8, got None"),
        ({"method": "lowrank"}, "method must be a Method .*got 'lowrank'"),
        ({"method": LowRank}, "method must be a Method"),
        ({"method": None}, "method must be a Method .*got None"),
        ({"value_method": 3}, "value_method must be a Method .*got 3"),
        ({"sinks": -1}, "sinks must be an integer >= 0, got -1"),
        ({"window": 1.5}, "window must be an integer >= 0, got 1.5"),
        ({"nonfinite": "ignore"}, 'nonfinite must be "raise" or "saturate", got \'ignore\''),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=message):
        KVCacheCompressor(**{"method": LowRank(2), **settings})


def test_wrong_shapes(xp):
    compressor = KVCacheCompressor(LowRank(2))
    x = np.zeros((1, 2, 5, 4), "float32")

    def refused(message, k, v, call=compressor.compress_kv):
        with pytest.raises(ShapeError, match=message) as caught:
            call(xp.asarray(k), xp.asarray(v))
        assert isinstance(caught.value, ValueError)

    refused("k must have 4 dimensions .*got 3: .*compress_kv_3d", x[0], x[0])
    refused("v must have 4 dimensions .*got 2", x, x[0, 0])
    refused("k must have 3 dimensions .*see compress_kv", x, x, compressor.compress_kv_3d)
    refused(r"agree .*\(1, 2, 5, 4\) and \(1, 2, 4, 4\)", x, x[:, :, :4])
    refused("agree", x, x[:, :1])
    refused("agree", x, np.concatenate([x, x]))
    refused(r"head_dim of v must be at least 1", x, x[..., :0])


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8", "bool", "complex64"])
def test_wrong_dtypes(xp, dtype):
    if xp.is_jax and dtype == "float64":
        pytest.skip("JAX has float64 only when asked for")
    good, bad = (
        xp.asarray(np.ones((1, 2, 5, 4), "float32")),
        xp.asarray(np.ones((1, 2, 5, 4), dtype)),
    )
    for k, v, name in ((good, bad, "v"), (bad, good, "k")):
        with pytest.raises(DTypeError, match=f"^{name} must be float16, .*float32, got {dtype}"):
            KVCacheCompressor(LowRank(2)).compress_kv(k, v)
    assert issubclass(DTypeError, TypeError)


def test_two_dtypes(xp):
    if "float16" not in xp.dtypes:
        pytest.skip("has one dtype")
    x = np.ones((1, 2, 5, 4))
    with pytest.raises(DTypeError, match="one dtype, got float16 and bfloat16"):
        KVCacheCompressor(LowRank(2)).compress_kv(
            xp.asarray(x.astype("float16")), xp.asarray(x.astype(ml_dtypes.bfloat16))
        )


def test_two_libraries(xp):
    import array_api_strict

    x = np.ones((1, 2, 5, 4), "float32")
    other = x if xp.name == "strict" else array_api_strict.asarray(x)
    for wrong in (other, x.tolist(), None, 3.0, "kv", object()):
        for k, v in ((xp.asarray(x), wrong), (wrong, xp.asarray(x))):
            with pytest.raises(NamespaceError, match="arrays of one library"):
                KVCacheCompressor(LowRank(2)).compress_kv(k, v)
    assert issubclass(NamespaceError, TypeError)


def test_settings_that_do_not_fit(xp):
    k, v = map(xp.asarray, kv())
    for method, message in (
        (LowRank(5), "rank must be at most head_dim = 4, got 5"),
        (Hybrid(9), "rank must be at most head_dim = 8, got 9"),
        (VectorQuantization(4, 3), "vector_dim must divide head_dim = 8"),
    ):
        with pytest.raises(SettingError, match=message):
            KVCacheCompressor(method).compress_kv(k, v)
        with pytest.raises(SettingError, match=message):
            KVCacheCompressor(method).estimate_size(*SHAPES)


def test_wrong_layout(xp):
    compressor = KVCacheCompressor(LowRank(2))
    k, v = map(xp.asarray, kv())
    batched, flat = compressor.compress_kv(k, v), compressor.compress_kv_3d(k[0, ...], v[0, ...])
    with pytest.raises(LayoutError, match=r"holds \[batch.*use decompress_kv$"):
        compressor.decompress_kv_3d(batched)
    with pytest.raises(LayoutError, match="use decompress_kv_3d"):
        compressor.decompress_kv(flat)
    with pytest.raises(LayoutError):
        compressor.decompress_to_mla_cache(flat, None, 0, 0)
    with pytest.raises(LayoutError):
        compressor.decompress_to_paged_cache(batched, types.SimpleNamespace(append=None), 0, 0)
    assert issubclass(LayoutError, ValueError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**127])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_not_finite(xp, value, role):
    for dtype in xp.dtypes:
        k, v = kv(dtype)
        bad = k if role == "keys" else v
        with np.errstate(over="ignore"):
            bad[1, 0, 20, 3] = bad[1, 1, 0, 0] = value
        compressor = KVCacheCompressor(LowRank(2))
        message = rf"^{role} hold .* at index \[1, 0, 20, 3\], and 1 more"
        with pytest.raises(NonFiniteError, match=message):
            compressor.compress_kv(xp.asarray(k), xp.asarray(v))


def test_saturate(xp):
    compressor = KVCacheCompressor(Hybrid(8, 8), nonfinite="saturate", sinks=2, window=19)
    for dtype in xp.dtypes:
        k, _ = kv(dtype, (SHAPES[0], SHAPES[0]))
        k[0, 0, 0, :5] = [np.nan, np.inf, -np.inf, -0.0, 1]
        before = k.tobytes()
        array = xp.asarray(k)
        z = xp.run(compress, array, array, compressor=compressor)
        out, _ = xp.run(decompress, z, compressor=compressor)  # all tokens are exact here
        limit = FLOAT16_MAX if dtype == "float16" else LARGEST
        expected = k.copy()
        expected[0, 0, 0, :3] = [0, limit, -limit]
        np.testing.assert_array_equal(xp.numpy(out), expected)
        assert xp.numpy(array).tobytes() == before


def test_saturated_values_are_coded(xp):
    compressor = KVCacheCompressor(LowRank(8), nonfinite="saturate")
    for dtype in xp.dtypes:
        k, _ = kv(dtype)
        k[0, 0, 0, :3] = [np.nan, np.inf, -np.inf]
        z = xp.run(compress, xp.asarray(k), xp.asarray(k), compressor=compressor)
        for out in xp.run(decompress, z, compressor=compressor):
            assert np.isfinite(xp.numpy(out).astype("float64")).all()


def test_magnitudes_up_to_the_limit_are_accepted(xp):
    for dtype in xp.dtypes:
        k, _ = kv(dtype)
        limit = FLOAT16_MAX if dtype == "float16" else LARGEST
        k[0, 0, 0, :2] = [limit, -limit]
        for method in METHODS:
            compressor = KVCacheCompressor(method)
            z = xp.run(compress, xp.asarray(k), xp.asarray(k), compressor=compressor)
            for out in xp.run(decompress, z, compressor=compressor):
                assert np.isfinite(xp.numpy(out).astype("float64")).all()


def test_estimate_size_refuses_other_dtypes():
    with pytest.raises(DTypeError, match="got 'float64'"):
        KVCacheCompressor(LowRank(2)).estimate_size((1, 2, 3, 4), dtype="float64")


def test_a_bad_call_changes_nothing():
    k, v = kv()
    v[0, 0, 0, 0] = np.nan
    before = k.tobytes(), v.tobytes()
    with pytest.raises(NonFiniteError):
        KVCacheCompressor(LowRank(2)).compress_kv(k, v)
    assert (k.tobytes(), v.tobytes()) == before


@pytest.mark.parametrize("shapes", [((4,), None), ((2, 3, 4), (3, 3, 4)), ((2, 3, 4), (4,))])
def test_estimate_size_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ShapeError, match=r"agree in all sizes but the last"):
        KVCacheCompressor(LowRank(2)).estimate_size(*shapes)
