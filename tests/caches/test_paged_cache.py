"""What is particular to `PagedKVCache`; what caches have in common is tested beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cache_kinds import BLOCKS, HEADS, KEY_DIM, KINDS, LAYERS, VALUE_DIM, Kind

from kvcompress import KVCacheCompressor, KVCompressError, LowRank, PagedKVCache
from kvcompress.errors import DTypeError, NamespaceError, ShapeError

PAGED = KINDS[0]


def pair(xp: Any, tokens: list[int]) -> tuple[Any, Any]:
    k, v = PAGED.inputs(0, tokens)
    return xp.asarray(k), xp.asarray(v)


def check_tokens(xp: Any, kv: tuple[Any, Any], tokens: list[int]) -> None:
    PAGED.check_restored(xp, kv, 0, [PAGED.row(0, t, i) for i, t in enumerate(tokens)])


def test_sizes(xp: Any) -> None:
    cache = PAGED.make(xp)
    assert (cache.num_layers, cache.num_kv_heads, cache.block_size) == (LAYERS, HEADS, 4)
    assert (cache.head_dim, cache.value_head_dim) == (KEY_DIM, VALUE_DIM)
    assert (cache.num_total_blocks, cache.num_free_blocks) == (BLOCKS, BLOCKS)
    assert f"{HEADS} KV heads, head_dim {KEY_DIM}" in repr(cache)


def test_strided_input(xp: Any) -> None:
    cache = PAGED.make(xp)
    cache.allocate_sequence(0)
    k, v = PAGED.inputs(0, [0, 1, 2])
    wide = np.repeat(k, 2, axis=1).transpose(1, 0, 2).copy()
    permute = xp.module.permute_dims if hasattr(xp.module, "permute_dims") else xp.module.permute
    keys = permute(xp.asarray(wide), (1, 0, 2))[:, ::2, :]
    cache.append(0, 0, keys, xp.asarray(v))
    check_tokens(xp, cache.get_kv(0, 0), [0, 1, 2])


def test_where_the_tokens_are(xp: Any) -> None:
    cache = PAGED.make(xp)
    cache.allocate_sequence("a")
    PAGED.append(xp, cache, 0, "a", list(range(6)))
    k, v = cache.paged_kv(0, "a")
    assert (k.shape, v.shape) == ((HEADS, 6, KEY_DIM), (HEADS, 6, VALUE_DIM))
    assert k.pool is cache._keys[0]
    table = cache.block_table("a")
    expected = [table[t // 4] * 4 + t % 4 for t in range(6)]
    assert xp.numpy(k.slots).tolist() == xp.numpy(v.slots).tolist() == expected


@pytest.mark.parametrize("arrays", ["few heads", "swapped", "different lengths"])
def test_arrays_that_do_not_fit(xp: Any, arrays: str) -> None:
    cache = PAGED.make(xp)
    cache.allocate_sequence(0)
    k, v = pair(xp, [0, 1])
    wrong = {
        "few heads": (k[:1, ...], v),
        "swapped": (v, k),
        "different lengths": (k[:, :1, :], v),
    }
    with pytest.raises(ShapeError):
        cache.append(0, 0, *wrong[arrays])


@pytest.mark.library("jax")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_arrays_of_another_library(kind: Kind) -> None:
    jax = pytest.importorskip("jax")

    class Host:
        module = np
        asarray = staticmethod(np.asarray)

    cache = kind.make(Host)
    cache.allocate_sequence(0)
    message = r"(holds arrays of numpy, got jax\.numpy|one library)"
    with pytest.raises(NamespaceError, match=message):
        kind.add(cache, 0, 0, *map(jax.numpy.asarray, kind.inputs(0, [0])))
    with pytest.raises(NamespaceError, match=r"holds arrays of numpy, got jax\.numpy"):
        kind.add_held(cache, 0, 0, *map(jax.numpy.asarray, kind.held(cache, 0, 0)))


@pytest.mark.parametrize(
    "sizes",
    [
        *({name: 0} for name in ("num_layers", "num_blocks", "num_kv_heads", "head_dim")),
        {"block_size": 0},
        {"value_head_dim": 0},
        {"num_blocks": 2**28, "block_size": 16},
        {"num_layers": 2.0},
        {"dtype": "float64"},
        {"dtype": "int8"},
        {"xp": math},
    ],
    ids=str,
)
def test_wrong_settings(sizes: dict[str, Any]) -> None:
    with pytest.raises(KVCompressError):
        PagedKVCache(**{"num_layers": 1, "num_blocks": 1, "num_kv_heads": 1, "head_dim": 1} | sizes)


def test_dtypes(xp: Any) -> None:
    for dtype in xp.dtypes:
        cache = PagedKVCache(
            LAYERS, BLOCKS, HEADS, KEY_DIM, value_head_dim=VALUE_DIM, dtype=dtype, xp=xp.module
        )
        cache.allocate_sequence(0)
        kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
        k, v = (x.astype(kind) for x in PAGED.inputs(0, [1, 2, 3, 4, 5]))
        cache.append(0, 0, xp.asarray(k), xp.asarray(v))
        for x, expected in zip(cache.get_kv(0, 0), (k, v), strict=True):
            assert x.dtype == xp.asarray(k).dtype
            np.testing.assert_array_equal(xp.numpy(x), expected)


@pytest.mark.library("strict")
def test_a_dtype_the_library_lacks() -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(DTypeError, match="array_api_strict has no dtype float16"):
        PagedKVCache(1, 1, 1, 1, xp=strict)


def test_what_is_swapped_in_is_close(xp: Any) -> None:
    compressor = KVCacheCompressor(LowRank(1), value_method=LowRank(VALUE_DIM), sinks=1, window=2)
    cache, tokens = PAGED.make(xp), list(range(11))
    cache.allocate_sequence("swapped")
    PAGED.append(xp, cache, 0, "swapped", tokens)
    compressed = compressor.compress_paged_cache(cache, 0, "swapped")
    cache.allocate_sequence("back")
    compressor.decompress_to_paged_cache(compressed, cache, 0, "back")
    # The tokens lie on a line, so that rank 1 suffices.
    for got, original in zip(cache.get_kv(0, "back"), PAGED.inputs(0, tokens), strict=True):
        np.testing.assert_allclose(xp.numpy(got), original, rtol=0, atol=1e-4)
