from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from kvcompress import CompressedKV, Hybrid, KVCacheCompressor, LowRank, VectorQuantization
from kvcompress.errors import DTypeError, NamespaceError

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
SHAPE = (2, 3, 40, 8)
COMPRESSOR = KVCacheCompressor(
    Hybrid(6, 3, outliers=0.05), value_method=VectorQuantization(16, 4, iterations=1), sinks=4
)


def compressed(xp, dtype="float32", compressor=COMPRESSOR, shape=SHAPE):
    x = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
    return compressor.compress_kv(xp.asarray(x), xp.asarray(x))


def arrays(z):
    """Every array found by walking the object, not by asking it."""
    if dataclasses.is_dataclass(z):
        return [a for f in dataclasses.fields(z) for a in arrays(getattr(z, f.name))]
    if isinstance(z, dict):
        return [a for value in z.values() for a in arrays(value)]
    return [z] if hasattr(z, "shape") and hasattr(z, "dtype") and hasattr(z, "ndim") else []


def content(xp, z):
    return [(xp.numpy(a).shape, xp.numpy(a).dtype, xp.numpy(a).tobytes()) for a in arrays(z)]


def test_bytes_are_honest(xp):
    for dtype in xp.dtypes:
        z = compressed(xp, dtype)
        assert len(arrays(z)) == 9 + 6 + 2
        nbytes = sum(xp.numpy(a).nbytes for a in arrays(z))
        item = np.dtype(DTYPES[dtype]).itemsize
        values = 2 * math.prod(SHAPE)
        exact = 2 * 2 * 3 * 4 * 8
        assert z.nbytes == z.keys.nbytes + z.values.nbytes == nbytes
        assert z.original_nbytes == values * item
        assert z.bits_per_value == pytest.approx(8 * nbytes / values)
        assert z.ratio == pytest.approx(values * item / nbytes)
        coded = 8 * (nbytes - exact * item) / (values - exact)
        assert z.coded_bits_per_value == pytest.approx(coded)
        assert z.keys.num_values == values // 2


def test_codes_are_really_packed():
    x = np.random.default_rng(0).standard_normal((1, 1, 64, 64)).astype("float32")
    for bits in (2, 3, 4, 8):
        z = KVCacheCompressor(Hybrid(64, bits, outliers=0.0)).compress_kv(x, x)
        assert z.keys.payload["codes"].nbytes == 64 * 64 * bits // 8


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 2, 0, 8)])
def test_nothing_has_no_ratio(xp, shape):
    z = compressed(xp, compressor=KVCacheCompressor(LowRank(2)), shape=shape)
    assert math.isnan(z.bits_per_value)
    assert math.isnan(z.coded_bits_per_value)
    assert math.isnan(z.ratio) or z.ratio == 0
    assert repr(z)


def test_all_tokens_exact():
    x = np.random.default_rng(0).standard_normal(SHAPE).astype("float32")
    compressor = KVCacheCompressor(LowRank(2), window=100)
    z = compressor.compress_kv(x, x)
    assert math.isnan(z.coded_bits_per_value)
    np.testing.assert_array_equal(compressor.decompress_kv(z)[0], x)


def test_repr(xp):
    text = repr(compressed(xp))
    for part in (
        "Hybrid(rank=6, quant_bits=3",
        "values VectorQuantization",
        "[2, 3, 40, 8]",
        "float32",
        "bytes",
        "bits/value",
        "x)",
    ):
        assert part in text
    library = {"strict": "array_api_strict", "jax-jit": "jax.numpy", "jax": "jax.numpy"}
    assert library.get(xp.name, xp.name.partition("-")[0]) in text
    assert "\n" not in text


def test_pickle_and_copy(xp):
    for dtype in xp.dtypes:
        z = compressed(xp, dtype)
        for other in (pickle.loads(pickle.dumps(z)), copy.copy(z), copy.deepcopy(z)):
            assert isinstance(other, CompressedKV)
            assert content(xp, other) == content(xp, z)
            assert all(map(xp.owns, arrays(other)))
            for name in ("layout", "shape", "dtype", "sinks", "nbytes"):
                assert getattr(other, name) == getattr(z, name)
            for a, b in zip(*map(COMPRESSOR.decompress_kv, (other, z)), strict=True):
                assert xp.numpy(a).tobytes() == xp.numpy(b).tobytes()


def test_deep_copies_share_nothing():
    z = compressed(types.SimpleNamespace(asarray=np.array))
    other = copy.deepcopy(z)
    before = [a.tobytes() for a in arrays(z)]
    for a in arrays(other):
        a[...] = 0
    assert [a.tobytes() for a in arrays(z)] == before


def test_frozen(xp):
    z = compressed(xp)
    with pytest.raises(dataclasses.FrozenInstanceError):
        z.sinks = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        z.keys.exact = None


def test_to_numpy_and_back(xp):
    for dtype in xp.dtypes:
        z = compressed(xp, dtype)
        host = z.to(np)
        assert all(type(a) is np.ndarray for a in arrays(host))
        assert [a.tobytes() for a in arrays(host)] == [c[2] for c in content(xp, z)]
        assert [a.dtype for a in arrays(host)] == [c[1] for c in content(xp, z)]
        assert (host.layout, host.shape, host.nbytes) == (z.layout, z.shape, z.nbytes)
        back = host.to(xp.module)
        assert all(map(xp.owns, arrays(back)))
        assert content(xp, back) == content(xp, z)
        # Another library may contract its sums otherwise, and no more than that.
        for a, b in zip(COMPRESSOR.decompress_kv(host), COMPRESSOR.decompress_kv(z), strict=True):
            a, b = a.astype("float64"), xp.numpy(b).astype("float64")
            unit = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
            assert (abs(a - b) <= unit * (abs(b) + 1)).all()


def test_to_another_device(xp):
    z = compressed(xp)
    device = getattr(arrays(z)[0], "device", None)
    moved = z.to(xp.module, device=device)
    assert content(xp, moved) == content(xp, z)
    assert moved.device == z.device


@pytest.mark.parametrize("library", [None, 3, "numpy", math])
def test_to_what_is_no_library(library):
    z = compressed(types.SimpleNamespace(asarray=np.array))
    with pytest.raises(NamespaceError, match="array library"):
        z.to(library)


def test_to_a_library_without_the_dtype():
    import array_api_strict

    z = compressed(types.SimpleNamespace(asarray=np.array), "bfloat16")
    with pytest.raises(DTypeError, match="bfloat16"):
        z.to(array_api_strict)


@pytest.mark.library("jax")
def test_unpickled_in_a_fresh_process_it_is_a_pytree():
    import jax.numpy as jnp

    z = compressed(types.SimpleNamespace(asarray=jnp.asarray))
    program = (
        "import pickle, sys, jax; z = pickle.load(sys.stdin.buffer);"
        "print(len(jax.tree_util.tree_leaves(z)), type(jax.tree_util.tree_map(abs, z)).__name__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(z), capture_output=True, check=True
    )
    assert out.stdout.split() == [b"17", b"CompressedKV"]
