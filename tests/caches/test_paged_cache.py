from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcompress import KVCacheCompressor, KVCompressError, KVLayout, LowRank, PagedKVCache
from kvcompress.errors import (
    DTypeError,
    NamespaceError,
    OutOfBlocks,
    SequenceExists,
    SettingError,
    ShapeError,
    UnknownLayer,
    UnknownSequence,
)

LAYERS, BLOCKS, HEADS, KEY_DIM, VALUE_DIM, BLOCK = 2, 9, 2, 3, 2, 4


def make(xp: Any, **sizes: Any) -> PagedKVCache:
    options = {"num_layers": LAYERS, "num_blocks": BLOCKS, "num_kv_heads": HEADS}
    options |= {"head_dim": KEY_DIM, "value_head_dim": VALUE_DIM, "block_size": BLOCK}
    return PagedKVCache(**(options | {"dtype": "float32", "xp": xp.module} | sizes))


def rows(tokens: list[int], channels: int, *, sign: int = 1) -> np.ndarray:
    """``[HEADS, tokens, channels]``: every number tells its token, head and channel."""
    head, channel = np.ogrid[:HEADS, :channels]
    place = (head * channels + channel) / (HEADS * channels)
    token = np.array(tokens, dtype=np.float32).reshape(1, -1, 1)
    return (sign * (token + place[:, None, :])).astype(np.float32)


def keys_of(tokens: list[int]) -> np.ndarray:
    return rows(tokens, KEY_DIM)


def values_of(tokens: list[int]) -> np.ndarray:
    return rows(tokens, VALUE_DIM, sign=-1)


def append(xp: Any, cache: PagedKVCache, seq_id: Any, layer: int, tokens: list[int]) -> None:
    cache.append(seq_id, layer, xp.asarray(keys_of(tokens)), xp.asarray(values_of(tokens)))


def check_tokens(xp: Any, kv: tuple[Any, Any], tokens: list[int]) -> None:
    np.testing.assert_array_equal(xp.numpy(kv[0]), keys_of(tokens))
    np.testing.assert_array_equal(xp.numpy(kv[1]), values_of(tokens))


def poison(xp: Any, cache: PagedKVCache, blocks: list[int]) -> None:
    """Overwrite blocks with NaN in all pools, as no user can."""
    hit = np.isin(np.arange(cache.num_blocks * cache.block_size) // cache.block_size, blocks)
    for pool in (cache._keys, cache._values):
        for layer, x in enumerate(pool):
            pool[layer] = xp.asarray(np.where(hit[:, None, None], np.nan, xp.numpy(x)))


def state(xp: Any, cache: PagedKVCache) -> Any:
    """Everything about a cache that can be observed, and its bookkeeping."""
    return pickle.dumps(
        (
            cache._sequences,
            cache._references,
            cache._free,
            [
                [xp.numpy(x) for x in cache.get_kv(seq_id, layer)]
                for seq_id in cache._sequences
                for layer in range(cache.num_layers)
            ],
        )
    )


@dataclass
class Read:
    """What a cache gave back once, and a copy of it."""

    arrays: tuple[Any, Any]
    copies: tuple[np.ndarray, np.ndarray]


class PagedMachine(RuleBasedStateMachine):
    """A paged cache against plain lists of tokens, one per sequence and layer."""

    live = Bundle("live")
    dead = Bundle("dead")

    def __init__(self, xp: Any) -> None:
        super().__init__()
        self.xp = xp
        self.cache = make(xp)
        self.model: dict[int, list[list[int]]] = {}
        self.reads: list[Read] = []
        self.tokens = self.names = 0

    def new_name(self) -> int:
        self.names += 1
        return self.names

    @rule(target=live)
    def allocate(self) -> int:
        name = self.new_name()
        self.cache.allocate_sequence(name)
        self.model[name] = [[] for _ in range(LAYERS)]
        return name

    @rule(name=live, layers=st.sampled_from([[0], [1], [0, 1]]), count=st.integers(0, 6))
    def append(self, name: int, layers: list[int], count: int) -> None:
        for layer in layers:
            tokens = list(range(self.tokens, self.tokens + count))
            self.tokens += count
            if self.blocks_needed(name, layer, count) > self.cache.num_free_blocks:
                before = state(self.xp, self.cache)
                with pytest.raises(OutOfBlocks):
                    append(self.xp, self.cache, name, layer, tokens)
                assert state(self.xp, self.cache) == before
            else:
                append(self.xp, self.cache, name, layer, tokens)
                self.model[name][layer] += tokens

    def blocks_needed(self, name: int, layer: int, count: int) -> int:
        """New blocks, and copies of the shared ones that are written to."""
        table, start = self.cache.block_table(name), len(self.model[name][layer])
        touched = {position // BLOCK for position in range(start, start + count)}
        owners = self.owners()
        return sum(i >= len(table) or owners[table[i]] > 1 for i in touched)

    def owners(self) -> Counter[int]:
        return Counter(b for name in self.model for b in self.cache.block_table(name))

    @rule(target=live, name=live)
    def fork(self, name: int) -> int:
        child = self.new_name()
        self.cache.fork(name, child)
        self.model[child] = [list(tokens) for tokens in self.model[name]]
        return child

    @rule(name=live, length=st.integers(0, 12))
    def truncate(self, name: int, length: int) -> None:
        self.cache.truncate(name, length)
        for tokens in self.model[name]:
            del tokens[length:]

    @rule(target=dead, name=consumes(live))
    def free(self, name: int) -> int:
        self.cache.free_sequence(name)
        del self.model[name]
        return name

    @rule(name=dead)
    def use_after_free(self, name: int) -> None:
        before = state(self.xp, self.cache)
        for use in (
            self.cache.free_sequence,
            self.cache.block_table,
            self.cache.seq_len,
            lambda name: self.cache.get_kv(name, 0),
            lambda name: self.cache.iter_kv_blocks(name, 0),
            lambda name: self.cache.truncate(name, 0),
            lambda name: self.cache.fork(name, "child"),
            lambda name: append(self.xp, self.cache, name, 0, [0]),
        ):
            with pytest.raises(UnknownSequence, match=f"no sequence {name}"):
                use(name)
        assert state(self.xp, self.cache) == before

    @rule(name=live, other=live)
    def name_in_use(self, name: int, other: int) -> None:
        before = state(self.xp, self.cache)
        with pytest.raises(SequenceExists):
            self.cache.allocate_sequence(name)
        with pytest.raises(SequenceExists):
            self.cache.fork(other, name)
        assert state(self.xp, self.cache) == before

    @rule(name=live, layer=st.integers(0, LAYERS - 1))
    def keep_what_was_read(self, name: int, layer: int) -> None:
        k, v = self.cache.get_kv(name, layer)
        self.reads.append(Read((k, v), (self.xp.numpy(k), self.xp.numpy(v))))

    @precondition(lambda self: self.reads)
    @rule()
    def what_was_read_stays(self) -> None:
        for read in self.reads:
            for x, copy in zip(read.arrays, read.copies, strict=True):
                np.testing.assert_array_equal(self.xp.numpy(x), copy)

    @rule(name=live, layer=st.integers(0, LAYERS - 1))
    def read_by_blocks(self, name: int, layer: int) -> None:
        tokens = self.model[name][layer]
        chunks = [tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK)]
        blocks = list(self.cache.iter_kv_blocks(name, layer))
        assert len(blocks) == len(chunks)
        for kv, chunk in zip(blocks, chunks, strict=True):
            check_tokens(self.xp, kv, chunk)

    @invariant()
    def blocks_are_owned(self) -> None:
        owners, free = self.owners(), self.cache._free
        assert self.cache._references == [owners[block] for block in range(BLOCKS)]
        assert sorted(free) == [block for block in range(BLOCKS) if not owners[block]]
        assert self.cache.num_free_blocks == len(free)
        for name, layers in self.model.items():
            table = self.cache.block_table(name)
            assert len(table) == len(set(table)) == math.ceil(max(map(len, layers)) / BLOCK)

    @invariant()
    def rows_are_those_of_the_sequence(self) -> None:
        poison(self.xp, self.cache, self.cache._free)
        for name, layers in self.model.items():
            for layer, tokens in enumerate(layers):
                assert self.cache.seq_len(name, layer) == len(tokens)
                check_tokens(self.xp, self.cache.get_kv(name, layer), tokens)


def test_against_lists_of_tokens(xp: Any) -> None:
    if xp.name == "jax-jit":
        pytest.skip("a cache is used eagerly")
    examples, steps = (40, 30) if xp.name == "numpy" else (3, 15)
    run_state_machine_as_test(
        lambda: PagedMachine(xp),
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None),
    )


def test_fork_shares_blocks_until_one_writes(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence("parent")
    for layer in range(LAYERS):
        append(xp, cache, "parent", layer, [0, 1, 2, 3, 4, 5])
    cache.fork("parent", "child")
    assert cache.num_free_blocks == BLOCKS - 2
    assert cache.block_table("child") == cache.block_table("parent")

    append(xp, cache, "child", 0, [60])
    assert cache.num_free_blocks == BLOCKS - 3
    assert cache.block_table("child")[0] == cache.block_table("parent")[0]
    assert cache.block_table("child")[1] != cache.block_table("parent")[1]
    check_tokens(xp, cache.get_kv("child", 0), [0, 1, 2, 3, 4, 5, 60])
    check_tokens(xp, cache.get_kv("child", 1), [0, 1, 2, 3, 4, 5])

    append(xp, cache, "parent", 0, [6])  # its own again: no copy
    assert cache.num_free_blocks == BLOCKS - 3
    cache.free_sequence("parent")
    poison(xp, cache, cache._free)
    assert cache.num_free_blocks == BLOCKS - 2
    check_tokens(xp, cache.get_kv("child", 0), [0, 1, 2, 3, 4, 5, 60])
    check_tokens(xp, cache.get_kv("child", 1), [0, 1, 2, 3, 4, 5])


def test_every_shared_block_written_to_is_copied(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence("parent")
    append(xp, cache, "parent", 0, list(range(12)))
    cache.fork("parent", "child")
    append(xp, cache, "child", 1, list(range(20, 28)))  # two of the three blocks
    append(xp, cache, "parent", 1, list(range(40, 48)))
    assert cache.num_free_blocks == BLOCKS - 5
    for name, first in (("parent", 40), ("child", 20)):
        check_tokens(xp, cache.get_kv(name, 0), list(range(12)))
        check_tokens(xp, cache.get_kv(name, 1), list(range(first, first + 8)))


def test_copies_of_shared_blocks_need_free_blocks(xp: Any) -> None:
    cache = make(xp, num_blocks=2)
    cache.allocate_sequence("a")
    append(xp, cache, "a", 0, [0, 1, 2, 3, 4])
    cache.fork("a", "b")
    with pytest.raises(OutOfBlocks, match="1 blocks of 4 tokens are needed, 0 of 2 are free"):
        append(xp, cache, "b", 0, [5])
    cache.truncate("b", 4)
    with pytest.raises(OutOfBlocks):
        append(xp, cache, "b", 0, [5])
    cache.truncate("a", 4)
    append(xp, cache, "b", 0, [5])
    check_tokens(xp, cache.get_kv("a", 0), [0, 1, 2, 3])
    check_tokens(xp, cache.get_kv("b", 0), [0, 1, 2, 3, 5])


def test_out_of_blocks_changes_nothing(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence("a")
    append(xp, cache, "a", 0, list(range(5)))
    before = state(xp, cache)
    with pytest.raises(OutOfBlocks) as error:
        append(xp, cache, "a", 0, list(range(BLOCKS * BLOCK)))
    assert isinstance(error.value, MemoryError)
    assert state(xp, cache) == before


def test_no_tokens(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence(0)
    append(xp, cache, 0, 0, [])
    k, v = cache.get_kv(0, 1)
    assert (tuple(k.shape), tuple(v.shape)) == ((HEADS, 0, KEY_DIM), (HEADS, 0, VALUE_DIM))
    assert xp.owns(k)
    assert k.dtype == xp.module.float32
    assert (list(cache.iter_kv_blocks(0, 0)), cache.block_table(0)) == ([], ())
    assert cache.num_free_blocks == BLOCKS


def test_the_caller_owns_what_goes_in_and_comes_out(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence(0)
    k, v = xp.asarray(keys_of([0, 1, 2, 3, 4])), xp.asarray(values_of([0, 1, 2, 3, 4]))
    cache.append(0, 0, k, v)
    taken = [cache.get_kv(0, 0), *cache.iter_kv_blocks(0, 0), (k, v)]
    if xp.name not in ("numpy-readonly", "jax", "jax-jit"):
        for pair in taken:
            for x in pair:
                x[...] = float("nan")
    elif xp.name == "numpy-readonly":
        assert all(x.flags.writeable for pair in taken[:-1] for x in pair)
    check_tokens(xp, cache.get_kv(0, 0), [0, 1, 2, 3, 4])


def test_an_append_does_not_copy_the_pool(xp: Any) -> None:
    if xp.is_jax or xp.name == "strict":
        pytest.skip(f"{xp} cannot write in place")
    cache = make(xp)
    pools = [*cache._keys, *cache._values]
    cache.allocate_sequence("a")
    append(xp, cache, "a", 0, [0, 1, 2])
    cache.fork("a", "b")
    append(xp, cache, "b", 0, [3])
    assert all(x is y for x, y in zip(pools, [*cache._keys, *cache._values], strict=True))


def test_strided_input(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence(0)
    wide = np.repeat(keys_of([0, 1, 2]), 2, axis=1).transpose(1, 0, 2).copy()
    k = xp.module.permute_dims if hasattr(xp.module, "permute_dims") else xp.module.permute
    keys = k(xp.asarray(wide), (1, 0, 2))[:, ::2, :]
    cache.append(0, 0, keys, xp.asarray(values_of([0, 1, 2])))
    check_tokens(xp, cache.get_kv(0, 0), [0, 1, 2])


def test_a_sequence_freed_while_its_blocks_are_read(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence("a")
    append(xp, cache, "a", 0, list(range(10)))
    blocks = cache.iter_kv_blocks("a", 0)
    check_tokens(xp, next(blocks), [0, 1, 2, 3])
    cache.free_sequence("a")
    poison(xp, cache, cache._free)
    with pytest.raises(UnknownSequence):
        next(blocks)


def test_wrong_arrays_change_nothing(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence(0)
    append(xp, cache, 0, 0, [0, 1])
    before = state(xp, cache)
    k, v = xp.asarray(keys_of([2, 3])), xp.asarray(values_of([2, 3]))
    small, other = xp.asarray(keys_of([2])), xp.asarray(np.zeros((HEADS, 2, KEY_DIM), "int32"))
    host = keys_of([2, 3]).tolist()
    for error, arrays in (
        (ShapeError, (v, k)),
        (ShapeError, (k[:1, ...], v)),
        (ShapeError, (k[None, ...], v)),
        (ShapeError, (k[0, ...], v)),
        (ShapeError, (small, v)),
        (DTypeError, (other, v)),
        (NamespaceError, (host, v)),
        (NamespaceError, (k, None)),
    ):
        with pytest.raises(error):
            cache.append(0, 0, *arrays)
    for layer in (-1, LAYERS, 0.5, "0"):
        for use in (cache.seq_len, cache.get_kv, cache.iter_kv_blocks):
            with pytest.raises(UnknownLayer, match="layer must be from 0 to 1"):
                use(0, layer)
        with pytest.raises(UnknownLayer):
            cache.append(0, layer, k, v)
    for length in (-1, 1.0, None):
        with pytest.raises(SettingError, match="length must be"):
            cache.truncate(0, length)
    assert state(xp, cache) == before


@pytest.mark.library("jax")
def test_arrays_of_another_library_or_a_compiler() -> None:
    jax = pytest.importorskip("jax")
    k, v = jax.numpy.asarray(keys_of([0])), jax.numpy.asarray(values_of([0]))
    sizes = {"value_head_dim": VALUE_DIM, "dtype": "float32"}
    host = PagedKVCache(LAYERS, BLOCKS, HEADS, KEY_DIM, **sizes)
    device = PagedKVCache(LAYERS, BLOCKS, HEADS, KEY_DIM, **sizes, xp=jax.numpy)
    for cache in (host, device):
        cache.allocate_sequence(0)
    with pytest.raises(NamespaceError, match=r"holds arrays of numpy, got jax\.numpy"):
        host.append(0, 0, k, v)

    @jax.jit
    def traced(k: Any, v: Any) -> int:
        device.append(0, 0, k, v)
        return 0

    with pytest.raises(NamespaceError, match="traced"):
        traced(k, v)
    assert device.seq_len(0) == 0


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
        cache = make(xp, dtype=dtype)
        cache.allocate_sequence(0)
        k, v = keys_of([1, 2, 3, 4, 5]), values_of([1, 2, 3, 4, 5])
        k, v = (x.astype(_dtype(dtype)) for x in (k, v))
        cache.append(0, 0, xp.asarray(k), xp.asarray(v))
        for x, expected in zip(cache.get_kv(0, 0), (k, v), strict=True):
            assert x.dtype == xp.asarray(k).dtype
            np.testing.assert_array_equal(xp.numpy(x), expected)


@pytest.mark.library("strict")
def test_a_dtype_the_library_lacks() -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(DTypeError, match="array_api_strict has no dtype float16"):
        PagedKVCache(1, 1, 1, 1, xp=strict)


def test_repr(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence(0)
    append(xp, cache, 0, 0, [0])
    text = repr(cache)
    for part in ("2 layers", "float32", "1 sequences", "8 of 9 blocks of 4 tokens free"):
        assert part in text
    assert str(cache.device) in text


SWAP = KVCacheCompressor(LowRank(1), value_method=LowRank(VALUE_DIM), sinks=1, window=2)


def test_swapped_out_and_back(xp: Any) -> None:
    cache = make(xp)
    cache.allocate_sequence("other")
    append(xp, cache, "other", 0, [100, 101])
    cache.allocate_sequence("swapped")
    tokens = list(range(11))
    for layer in range(LAYERS):
        append(xp, cache, "swapped", layer, tokens)

    stored = [SWAP.compress_paged_cache(cache, "swapped", i) for i in range(LAYERS)]
    assert all(compressed.layout is KVLayout.UNBATCHED for compressed in stored)
    check_tokens(xp, cache.get_kv("swapped", 0), tokens)
    cache.free_sequence("swapped")
    poison(xp, cache, cache._free)

    cache.allocate_sequence("back")
    for layer, compressed in enumerate(stored):
        SWAP.decompress_to_paged_cache(compressed, cache, "back", layer)
        restored = cache.get_kv("back", layer)
        for got, direct in zip(restored, SWAP.decompress_kv_3d(compressed), strict=True):
            assert got.dtype == direct.dtype
            np.testing.assert_array_equal(xp.numpy(got), xp.numpy(direct))
        for got, original in zip(restored, (keys_of(tokens), values_of(tokens)), strict=True):
            # The tokens lie on a line, so rank 1 suffices.
            np.testing.assert_allclose(xp.numpy(got), original, rtol=0, atol=1e-4)
    append(xp, cache, "back", 0, [11])
    assert cache.seq_len("back", 0) == 12
    check_tokens(xp, cache.get_kv("other", 0), [100, 101])


def test_a_cache_too_small_to_swap_in(xp: Any) -> None:
    large, small = make(xp), make(xp, num_blocks=2)
    large.allocate_sequence(0)
    small.allocate_sequence(0)
    append(xp, large, 0, 0, list(range(11)))
    append(xp, small, 0, 0, [7])
    compressed, before = SWAP.compress_paged_cache(large, 0), state(xp, small)
    with pytest.raises(OutOfBlocks):
        SWAP.decompress_to_paged_cache(compressed, small, 0)
    assert state(xp, small) == before


def _dtype(name: str) -> Any:
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name
