"""The CUDA kernels that work on the slots of a pool, emulated."""

from __future__ import annotations

import itertools

import hard
import numpy as np
import pytest

from kvcompress import GroupQuantization, KVCacheCompressor, PagedKVCache, RotatedQuantization, ops
from kvcompress.arrays import FLOAT16_MAX, FLOATING, dtype_of, namespace_of
from kvcompress.backend import Dispatcher
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.rotated import RotatedSpec

pytestmark = pytest.mark.xdist_group("built")  # in one process: the kernels are built once

AXES = ("channel", "token")


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        bits = f"u{a.dtype.itemsize}"
        assert np.array_equal(
            np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
        )


def pool_of(tokens, heads, n, dtype, *, seed=0):
    """A pool with more slots than tokens, which NaN fills, and where the tokens are."""
    rng = np.random.default_rng(seed)
    x = hard.values((heads, tokens, n), dtype, bits=4, seed=seed)
    slots = rng.permutation(tokens + 9)[:tokens].astype("int32")
    pool = np.full((tokens + 9, heads, n), np.nan, x.dtype)
    pool[slots] = np.swapaxes(x, 0, 1)
    return pool, slots, x


SIZES = [*itertools.product((1, 70, 300), (1, 3), (1, 5, 64, 128, 100))]


@pytest.mark.parametrize("dtype", FLOATING)
def test_gather_and_scatter(backend, dtype):
    for tokens, heads, n in SIZES:
        pool, slots, x = pool_of(tokens, heads, n, dtype)
        assert backend.supports("gather_slots", pool, slots)
        same([backend.gather_slots(pool, slots)], [x])
        odd = np.zeros(pool.size + 1, pool.dtype)[1:].reshape(pool.shape)  # nothing is aligned
        spread = np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 0, 1)), 0, 1)
        for target, tensor in itertools.product((np.zeros_like(pool), odd), (x, spread)):
            target[...] = 1
            expected = ops.scatter_slots(target.copy(), slots, tensor)
            assert backend.supports("scatter_slots", target, slots, tensor)
            assert backend.scatter_slots(target, slots, tensor) is target
            same([target], [expected])
        same([backend.gather_slots(odd, slots)], [x])
    assert backend.runtime.copies == 0


@pytest.mark.parametrize("dtype", FLOATING)
def test_quantized_in_place(backend, dtype):
    for tokens, heads, n in SIZES:
        pool, slots, x = pool_of(tokens, heads, n, dtype)
        for axis, size, bits in itertools.product(AXES, (64, 1000), (3, 4)):
            spec = AffineSpec(bits, size, axis)
            assert backend.supports("quantize_paged", pool, slots, spec=spec)
            same(backend.quantize_paged(pool, slots, spec=spec), ops.quantize(x, spec=spec))
        if n in (64, 128):
            rotated = RotatedSpec(4, 0)
            assert backend.supports("quantize_rotated_paged", pool, slots, spec=rotated)
            got = backend.quantize_rotated_paged(pool, slots, spec=rotated)
            same(got, ops.quantize_rotated(x, spec=rotated))
    assert backend.runtime.copies == 0
    assert not backend.supports("quantize_paged", pool, slots.astype("int64"), spec=spec)
    assert not backend.supports("quantize_paged", pool[..., ::2], slots, spec=spec)


def test_no_tokens(backend):
    pool, slots, x = pool_of(3, 2, 64, "float16")
    none, x = slots[:0], x[:, :0]
    same([backend.gather_slots(pool, none)], [x])
    assert backend.scatter_slots(pool, none, x) is pool
    assert backend.within_paged(pool, none, limit=0.0)
    spec = AffineSpec(4, 64, "channel")
    same(backend.quantize_paged(pool, none, spec=spec), ops.quantize(x, spec=spec))
    spec = RotatedSpec(4, 0)
    same(backend.quantize_rotated_paged(pool, none, spec=spec), ops.quantize_rotated(x, spec=spec))


@pytest.mark.parametrize("dtype", FLOATING)
def test_within(backend, dtype):
    kind = np.dtype(dtype_of(namespace_of(np), dtype))
    rng = np.random.default_rng(0)
    limits = [0.0, 1.0, 2.0**-14, FLOAT16_MAX if dtype == "float16" else 2.0**120]
    bad = [np.nan, -np.nan, np.inf, -np.inf]
    for (tokens, heads, n), limit in itertools.product(SIZES, limits):
        x = ((rng.random((heads, tokens, n)) * 2 - 1) * limit).astype(kind)
        x.reshape(-1)[rng.integers(x.size)] = rng.choice([limit, -limit, -0.0])
        with np.errstate(over="ignore"):
            above = np.nextafter(np.asarray(limit, kind), np.asarray(np.inf, kind))
        for worse in (None, *bad, above, -above):
            y = x.copy()
            if worse is not None:
                y[np.unravel_index(rng.integers(x.size), x.shape)] = worse
            got = backend.within(y, limit=limit)
            assert (got.shape, got.dtype) == ((), bool)
            assert bool(got) == (worse is None) == bool(ops.within(y, limit=limit))
            wide = np.full((heads, tokens, n + 1), np.nan, kind)
            wide[..., :n] = y
            assert bool(backend.within(wide[..., :n], limit=limit)) == (worse is None)
            pool = np.full((tokens + 9, heads, n), np.nan, kind)
            slots = rng.permutation(tokens + 9)[:tokens].astype("int32")
            pool[slots] = np.swapaxes(y, 0, 1)
            assert bool(backend.within_paged(pool, slots, limit=limit)) == (worse is None)
    assert backend.runtime.copies == 0


@pytest.mark.parametrize("method", [GroupQuantization(4), RotatedQuantization(4)])
def test_what_is_copied_of_a_paged_cache(backend, monkeypatch, method):
    monkeypatch.setattr("kvcompress.compressor.compressor.select", lambda _: Dispatcher((backend,)))
    monkeypatch.setattr("kvcompress.caches.pools.select", lambda: Dispatcher((backend,)))
    cache = PagedKVCache(1, 40, 2, 64)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        cache.allocate_sequence(name)
    for count in (100, 33, 90):
        for name in ("a", "b"):
            k, v = rng.standard_normal((2, 2, count, 64)).astype("float16")
            cache.append(0, name, k, v)
    compressor = KVCacheCompressor(method, sinks=4, window=16)
    backend.runtime.launches.clear()
    compressed = compressor.compress_paged_cache(cache, 0, "b")
    families = [launch.family for launch in backend.runtime.launches]
    assert families.count("within") == 2
    gathered = [x for x in backend.runtime.launches if x.family == "gather_slots"]
    exact = [4, 16]
    # No kernel finds the spread of channels: the keys that RotatedQuantization codes are copied.
    coded_keys = [203] if isinstance(method, RotatedQuantization) else []
    assert [int(x.scalars[0]) for x in gathered] == [*exact, *coded_keys, *exact]
    assert backend.runtime.copies == 0
    expected = compressor.compress_kv_3d(*cache.get_kv(0, "b"))
    for a, b in ((compressed.keys, expected.keys), (compressed.values, expected.values)):
        same([*a.payload.values(), a.exact], [*b.payload.values(), b.exact])
    cache.free_sequence("b")
    cache.allocate_sequence("c")
    compressor.decompress_to_paged_cache(compressed, cache, 0, "c")
    assert backend.runtime.launches[-1].family == "scatter_slots"
    same(cache.get_kv(0, "c"), compressor.decompress_kv_3d(compressed))
