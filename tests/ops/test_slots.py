from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvcompress import (
    GroupQuantization,
    KVCacheCompressor,
    LowRank,
    PagedKVCache,
    RotatedQuantization,
    ops,
)
from kvcompress.backend import Dispatcher
from kvcompress.errors import DTypeError, NamespaceError, NonFiniteError, ShapeError, SlotError
from kvcompress.ops import Paged, gather_slots, scatter_slots


def pool_and_slots(tokens, *, dtype="float32"):
    rng = np.random.default_rng(tokens)
    pool = rng.standard_normal((12, 3, 5)).astype(dtype)
    return pool, rng.permutation(12)[:tokens].astype("int32")


@pytest.mark.parametrize("tokens", [0, 1, 7, 12])
def test_gather(xp, tokens):
    pool, slots = pool_and_slots(tokens)
    got = xp.run(gather_slots, xp.asarray(pool), xp.asarray(slots))
    assert xp.owns(got)
    expected = np.empty((3, tokens, 5), "float32")
    for t, slot in enumerate(slots):
        for head in range(3):
            expected[head, t] = pool[slot, head]
    np.testing.assert_array_equal(xp.numpy(got), expected, strict=True)


@pytest.mark.parametrize("tokens", [0, 1, 7, 12])
def test_scatter(xp, tokens):
    pool, slots = pool_and_slots(tokens)
    x = np.random.default_rng(0).standard_normal((3, tokens, 5)).astype("float32")
    array, indices = xp.asarray(pool), xp.asarray(slots)
    if xp.name == "numpy-readonly":
        array = pool.copy()  # it is there to be written
    got = xp.run(scatter_slots, array, indices, xp.asarray(x))
    expected = pool.copy()
    for t, slot in enumerate(slots):
        expected[slot] = x[:, t]
    np.testing.assert_array_equal(xp.numpy(got), expected, strict=True)
    np.testing.assert_array_equal(xp.numpy(xp.run(gather_slots, got, indices)), x, strict=True)
    if not xp.is_jax and xp.name != "strict":
        assert got is array


def test_paged_stands_for_what_is_gathered(xp):
    pool, slots = (xp.asarray(a) for a in pool_and_slots(7))
    x, array = Paged(pool, slots), gather_slots(pool, slots)
    assert (x.shape, x.ndim, x.dtype) == (tuple(array.shape), array.ndim, array.dtype)
    assert Dispatcher().array(array) is array
    np.testing.assert_array_equal(xp.numpy(Dispatcher().array(x)), xp.numpy(array))
    part = xp.numpy(Dispatcher().array(x[:, 2:5, :]))
    np.testing.assert_array_equal(part, xp.numpy(array)[:, 2:5, :])
    with pytest.raises(IndexError, match="only tokens"):
        x[:1, :, :]
    spec = ops.AffineSpec(4, 4, "token")
    for a, b in zip(
        Dispatcher()(ops.quantize, x, spec=spec), ops.quantize(array, spec=spec), strict=True
    ):
        np.testing.assert_array_equal(xp.numpy(a), xp.numpy(b))


@pytest.mark.parametrize("slot", [-1, 12, 2**31 - 1, -(2**31)])
def test_slots_that_are_not_in_the_pool(xp, slot):
    pool, slots = pool_and_slots(7)
    slots[3] = slot
    with pytest.raises(SlotError, match=f"slots must be from 0 to 11, got {slot}"):
        Paged(xp.asarray(pool), xp.asarray(slots))
    assert Paged(xp.asarray(pool), xp.asarray(slots[:0])).shape == (3, 0, 5)


def test_a_pool_of_a_strange_cache(xp):
    """Nothing is read from a cache that says its tokens are where the pool is not."""
    pool, slots = (xp.asarray(a) for a in pool_and_slots(7))

    class Cache:
        def get_kv(self, layer, seq_id):
            raise AssertionError("it can be read in place")

        def paged_kv(self, layer, seq_id):
            return (Paged(pool, slots - (5 if seq_id == "bad" else 0)),) * 2

    compressor = KVCacheCompressor(LowRank(1), backend="generic")
    assert compressor.compress_paged_cache(Cache(), 0, "good").shape[0] == (3, 7, 5)
    with pytest.raises(SlotError):
        compressor.compress_paged_cache(Cache(), 0, "bad")


def test_pools_and_slots_that_do_not_fit(xp):
    pool, slots = (xp.asarray(a) for a in pool_and_slots(7))
    for error, arrays in (
        (ShapeError, (pool[:, :, 0], slots)),
        (ShapeError, (pool, slots[None, :])),
        (DTypeError, (pool, xp.asarray(np.zeros(3, "float32")))),
        (DTypeError, (pool, xp.asarray(np.zeros(3, "uint8")))),
        (NamespaceError, (pool, [0, 1])),
    ):
        with pytest.raises(error):
            Paged(*arrays)


class InPlace:
    """Reads pools in place, by gathering them, and says what it was asked."""

    name = "in place"

    def __init__(self):
        self.calls = []

    def available(self):
        return True

    def supports(self, op, *arrays, **static):
        assert not any(isinstance(x, Paged) for x in arrays)
        return static.get("spec") is None or static["spec"].bits != 3

    def __getattr__(self, name):
        if name not in ("within_paged", "quantize_paged", "quantize_rotated_paged"):
            raise AttributeError(name)

        def run(pool, slots, **static):
            self.calls.append(name)
            return getattr(ops, name.removesuffix("_paged"))(gather_slots(pool, slots), **static)

        return run


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        (GroupQuantization(4, 32), ["within_paged"] * 2 + ["quantize_paged"] * 2),
        (GroupQuantization(2, 32), ["within_paged"] * 2),  # clipped first
        (GroupQuantization(3, 32), ["within_paged"] * 2),  # not supported
        # Keys are centred first.
        (RotatedQuantization(4), ["within_paged"] * 2 + ["quantize_rotated_paged"]),
        (LowRank(4), []),
    ],
)
@pytest.mark.parametrize("exact", [{}, {"sinks": 4, "window": 8}, {"sinks": 400}])
def test_a_paged_cache_is_compressed_in_place(method, calls, exact):
    backend = InPlace()
    cache = PagedKVCache(1, 20, 2, 8, dtype="float32", value_head_dim=16)
    cache.allocate_sequence(0)
    rng = np.random.default_rng(0)
    for count in (1, 90, 50):
        cache.append(0, 0, *(rng.standard_normal((2, count, n)).astype("float32") for n in (8, 16)))
        cache.fork(0, str(count))  # blocks in no order
        cache.append(0, str(count), *(np.zeros((2, 3, n), "float32") for n in (8, 16)))
    compressor = KVCacheCompressor(method, **exact, backend="generic")
    expected = compressor.compress_kv_3d(*cache.get_kv(0, 0))
    inplace = replace(compressor, backend=Dispatcher((backend,)))
    got = inplace.compress_paged_cache(cache, 0, 0)
    assert backend.calls == calls
    for a, b in ((got.keys, expected.keys), (got.values, expected.values)):
        assert (a.exact is None) == (b.exact is None)
        if a.exact is not None:
            np.testing.assert_array_equal(a.exact, b.exact)
        assert a.payload.keys() == b.payload.keys()
        for name in a.payload:
            np.testing.assert_array_equal(a.payload[name], b.payload[name])


def test_what_is_not_finite_in_a_pool():
    cache = PagedKVCache(1, 4, 2, 8, dtype="float32")
    cache.allocate_sequence(0)
    x = np.ones((2, 20, 8), "float32")
    x[1, 17, 3] = np.nan
    cache.append(0, 0, np.ones_like(x), x)
    compressor = KVCacheCompressor(RotatedQuantization(4), backend=Dispatcher((InPlace(),)))
    with pytest.raises(NonFiniteError, match=r"values hold nan at index \[1, 17, 3\]"):
        compressor.compress_paged_cache(cache, 0, 0)
    saturating = replace(compressor, nonfinite="saturate")
    _, v = saturating.decompress_kv_3d(saturating.compress_paged_cache(cache, 0, 0))
    assert np.all(np.isfinite(v))
