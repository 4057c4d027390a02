"""What every kind of cache in blocks has in common."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from cache_kinds import (
    BLOCK,
    BLOCKS,
    KINDS,
    LAYERS,
    Kind,
    poison,
    state,
)

from kvcompress import KVCacheCompressor, KVLayout, LowRank
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

pytestmark = pytest.mark.parametrize("kind", KINDS, ids=str)


def check(xp: Any, kind: Kind, cache: Any, layer: int, seq_id: Any, rows: Any) -> None:
    kind.check_held(xp, cache, layer, seq_id, rows)
    kind.check_restored(xp, cache.get_kv(layer, seq_id), layer, rows)


def test_fork_shares_blocks_until_one_writes(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("parent")
    first, second = (
        kind.append(xp, cache, layer, "parent", [0, 1, 2, 3, 4, 5]) for layer in range(LAYERS)
    )
    assert cache.fork("parent", "child") == "child"
    assert cache.num_free_blocks == BLOCKS - 2
    assert cache.block_table("child") == cache.block_table("parent")

    longer = first + kind.append(xp, cache, 0, "child", [60])
    assert cache.num_free_blocks == BLOCKS - 3
    assert cache.block_table("child")[0] == cache.block_table("parent")[0]
    assert cache.block_table("child")[1] != cache.block_table("parent")[1]
    check(xp, kind, cache, 0, "child", longer)
    check(xp, kind, cache, 1, "child", second)
    check(xp, kind, cache, 0, "parent", first)

    kind.append(xp, cache, 0, "parent", [6])  # its own again: no copy
    assert cache.num_free_blocks == BLOCKS - 3
    cache.free_sequence("parent")
    poison(xp, cache, cache._blocks.free)
    assert cache.num_free_blocks == BLOCKS - 2
    check(xp, kind, cache, 0, "child", longer)
    check(xp, kind, cache, 1, "child", second)


def test_every_shared_block_written_to_is_copied(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("parent")
    prefix = kind.append(xp, cache, 0, "parent", list(range(12)))
    cache.fork("parent", "child")
    rows = {}
    for name, token in (("child", 20), ("parent", 40)):  # two of the three blocks
        rows[name] = kind.append(xp, cache, 1, name, list(range(token, token + 8)))
    assert cache.num_free_blocks == BLOCKS - 5
    for name in rows:
        check(xp, kind, cache, 0, name, prefix)
        check(xp, kind, cache, 1, name, rows[name])


def test_copies_of_shared_blocks_need_free_blocks(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp, num_blocks=2)
    cache.allocate_sequence("a")
    rows = kind.append(xp, cache, 0, "a", [0, 1, 2, 3, 4])
    cache.fork("a", "b")
    message = "need 1 more blocks of 4 tokens, but only 0 of 2 are free"
    with pytest.raises(OutOfBlocks, match=message):
        kind.append(xp, cache, 0, "b", [5])
    cache.truncate("b", 4)
    with pytest.raises(OutOfBlocks):
        kind.append(xp, cache, 0, "b", [5])
    cache.truncate("a", 4)
    added = kind.append(xp, cache, 0, "b", [5])
    check(xp, kind, cache, 0, "a", rows[:4])
    check(xp, kind, cache, 0, "b", rows[:4] + added)


def test_out_of_blocks_changes_nothing(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 0, "a", list(range(5)))
    before = state(xp, kind, cache)
    with pytest.raises(OutOfBlocks) as error:
        kind.append(xp, cache, 0, "a", list(range(BLOCKS * BLOCK)))
    assert isinstance(error.value, MemoryError)
    assert state(xp, kind, cache) == before


def test_no_tokens(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 0, "a", [])
    for kv in (cache.get_kv(0, "a"), kind.held(cache, 0, "a")):
        assert all(x.shape[1] == 0 for x in kv)
        assert all(xp.owns(x) for x in kv)
        assert all(x.dtype == xp.module.float32 for x in kv)
    check(xp, kind, cache, 0, "a", [])
    assert (list(cache.iter_kv_blocks(0, "a")), cache.block_table("a")) == ([], ())
    assert (cache.num_free_blocks, cache.num_blocks(0, "a")) == (BLOCKS, 0)


def test_layers_have_lengths_of_their_own(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    rows = kind.append(xp, cache, 1, "a", list(range(9)))
    assert [cache.seq_len(layer, "a") for layer in range(LAYERS)] == [0, 9]
    assert [cache.num_blocks(layer, "a") for layer in range(LAYERS)] == [0, 3]
    assert len(cache.block_table("a")) == 3
    check(xp, kind, cache, 0, "a", [])
    check(xp, kind, cache, 1, "a", rows)


def test_identifiers(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    first, second = cache.allocate_sequence(), cache.allocate_sequence()
    assert type(first) is int
    assert LAYERS <= first < second  # no layer can be taken for it
    assert cache.allocate_sequence(second + 1) == second + 1
    third = cache.fork(first)
    assert third > second + 1
    cache.free_sequence(third)
    cache.allocate_sequence(third + 4)
    cache.free_sequence(third + 4)
    assert cache.allocate_sequence() > third + 4  # never the name of another sequence
    assert cache.allocate_sequence(("request", 7)) == ("request", 7)
    for name in (first, np.int64(first), ("request", 7)):
        with pytest.raises(SequenceExists):
            cache.allocate_sequence(name)
    for call in (cache.allocate_sequence, lambda name: cache.fork(first, name)):
        with pytest.raises(UnknownSequence, match=r"must be hashable, got \[1\]"):
            call([1])


def test_layer_comes_first(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    fresh = cache.allocate_sequence()
    cache.allocate_sequence("chat")
    arrays = [xp.asarray(x) for x in kind.inputs(0, [0])]
    held = kind.held(cache, 0, "chat")
    compressor = KVCacheCompressor(LowRank(1))
    for name in ("chat", fresh):
        for call in (
            lambda *a: kind.add(cache, *a, *arrays),
            cache.get_kv,
            cache.seq_len,
            cache.num_blocks,
            cache.iter_kv_blocks,
            lambda *a: kind.held(cache, *a),
            lambda *a: kind.add_held(cache, *a, *held),
            lambda *a: compressor.compress_paged_cache(cache, *a),
        ):
            with pytest.raises(UnknownLayer) as error:
                call(name, 0)
            assert str(error.value) == (
                f"layer must be an integer from 0 to 1, got {name!r}; "
                "the order of the arguments is (layer, seq_id)"
            )
            assert isinstance(error.value, IndexError)
    assert (cache.seq_len(np.int64(1), fresh), cache.seq_len(np.uint8(0), "chat")) == (0, 0)


@pytest.mark.parametrize(
    "layer", [-1, LAYERS, 0.0, 0.5, "0", None, True, False, np.bool_(False), np.float32(0), [0]]
)
def test_what_is_no_layer(xp: Any, kind: Kind, layer: Any) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    arrays = [xp.asarray(x) for x in kind.inputs(0, [0])]
    held = kind.held(cache, 0, "a")
    for call in (
        lambda *a: kind.add(cache, *a, *arrays),
        lambda *a: kind.add_held(cache, *a, *held),
        lambda *a: kind.held(cache, *a),
        cache.get_kv,
        cache.seq_len,
        cache.num_blocks,
        cache.iter_kv_blocks,
    ):
        with pytest.raises(UnknownLayer, match="layer must be an integer from 0 to 1, got"):
            call(layer, "a")


@pytest.mark.parametrize("seq_id", ["b", -1, 0, None, [0], {}, np.zeros(3)], ids=repr)
def test_what_is_no_sequence(xp: Any, kind: Kind, seq_id: Any) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    arrays = [xp.asarray(x) for x in kind.inputs(0, [0])]
    held = kind.held(cache, 0, "a")
    for call in (
        lambda: kind.add(cache, 0, seq_id, *arrays),
        lambda: kind.add_held(cache, 0, seq_id, *held),
        lambda: kind.held(cache, 0, seq_id),
        lambda: cache.get_kv(0, seq_id),
        lambda: cache.seq_len(0, seq_id),
        lambda: cache.num_blocks(0, seq_id),
        lambda: cache.iter_kv_blocks(0, seq_id),
        lambda: cache.block_table(seq_id),
        lambda: cache.free_sequence(seq_id),
        lambda: cache.truncate(seq_id, 0),
        lambda: cache.fork(seq_id),
    ):
        with pytest.raises(UnknownSequence, match=r"the arguments is \(layer, seq_id\)"):
            call()


def test_an_array_for_a_layer(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    for x in (np.zeros((2, 3, 4), "float32"), np.array(0), np.array(True)):
        with pytest.raises(UnknownLayer, match="layer must be an integer from 0 to 1"):
            cache.get_kv(xp.asarray(x), "a")


def test_the_caller_owns_what_goes_in_and_comes_out(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    arrays = [xp.asarray(x) for x in kind.inputs(0, [0, 1, 2, 3, 4])]
    kind.add(cache, 0, "a", *arrays)
    held = kind.held(cache, 0, "a")
    before = [xp.numpy(x) for x in (*held, *cache.get_kv(0, "a"))]
    kind.add_held(cache, 1, "a", *kind.held(cache, 1, "a"))
    blocks = [x for kv in cache.iter_kv_blocks(0, "a") for x in kv]
    taken = [*held, *cache.get_kv(0, "a"), *blocks]
    if xp.name == "numpy-readonly":
        assert all(x.flags.writeable for x in taken)
    elif not xp.is_jax:
        for x in (*taken, *arrays):
            x[...] = float("nan")
    after = (*kind.held(cache, 0, "a"), *cache.get_kv(0, "a"))
    for x, kept in zip(after, before, strict=True):
        np.testing.assert_array_equal(xp.numpy(x), kept)


def test_an_append_does_not_copy_the_pool(xp: Any, kind: Kind) -> None:
    if xp.is_jax or xp.name == "strict":
        pytest.skip(f"{xp} cannot write in place")
    cache = kind.make(xp)
    pools = [*cache._keys.arrays, *cache._values.arrays]
    cache.allocate_sequence("a")
    kind.append(xp, cache, 0, "a", [0, 1, 2])
    cache.fork("a", "b")
    kind.append(xp, cache, 0, "b", [3])
    now = [*cache._keys.arrays, *cache._values.arrays]
    assert all(x is y for x, y in zip(pools, now, strict=True))


@pytest.mark.parametrize("allocated_again", [False, True])
def test_a_sequence_freed_while_its_blocks_are_read(
    xp: Any, kind: Kind, allocated_again: bool
) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    rows = kind.append(xp, cache, 0, "a", list(range(10)))
    blocks = cache.iter_kv_blocks(0, "a")
    kind.check_restored(xp, next(blocks), 0, rows[:4])
    cache.free_sequence("a")
    poison(xp, cache, cache._blocks.free)
    if allocated_again:
        cache.allocate_sequence("a")
        kind.append(xp, cache, 0, "a", list(range(20, 30)))
    with pytest.raises(UnknownSequence):
        next(blocks)


def test_a_sequence_changed_while_its_blocks_are_read(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    rows = kind.append(xp, cache, 0, "a", list(range(6)))
    blocks = cache.iter_kv_blocks(0, "a")
    kind.check_restored(xp, next(blocks), 0, rows[:4])
    rows += kind.append(xp, cache, 0, "a", [6])
    kind.check_restored(xp, next(blocks), 0, rows[4:])
    cache.truncate("a", 2)
    assert list(blocks) == []


def test_wrong_arrays_change_nothing(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 0, "a", [0, 1])
    before = state(xp, kind, cache)
    x, *others = (xp.asarray(a) for a in kind.inputs(0, [2, 3]))
    k, v = kind.held(cache, 0, "a")
    wrong = xp.asarray(np.ones(tuple(x.shape), "int32"))
    for error, arrays in (
        (ShapeError, (x[..., :-1], *others)),
        (ShapeError, (x[None, ...], *others)),
        (ShapeError, (x[0, ...], *others)),
        (DTypeError, (wrong, *others)),
        (NamespaceError, (xp.numpy(x).tolist(), *others)),
        (NamespaceError, (None, *others)),
    ):
        with pytest.raises(error):
            kind.add(cache, 0, "a", *arrays)
    for error, arrays in (
        (ShapeError, (v, k)),
        (ShapeError, (k[:, :1, :], v)),
        (ShapeError, (k[:0, ...], v[:0, ...])),
        (ShapeError, (k[None, ...], v)),
        (ShapeError, (k[0, ...], v)),
        (DTypeError, (xp.asarray(np.ones(tuple(k.shape), "int32")), v)),
        (NamespaceError, (xp.numpy(k).tolist(), v)),
        (NamespaceError, (k, None)),
    ):
        with pytest.raises(error):
            kind.add_held(cache, 0, "a", *arrays)
    for length in (-1, 1.0, None, True):
        with pytest.raises(SettingError, match="length must be"):
            cache.truncate("a", length)
    assert state(xp, kind, cache) == before


@pytest.mark.library("jax")
def test_a_compiler_cannot_append(kind: Kind) -> None:
    jax = pytest.importorskip("jax")

    class Library:
        module = jax.numpy
        asarray = staticmethod(jax.numpy.asarray)

    cache = kind.make(Library)
    cache.allocate_sequence("a")

    @jax.jit
    def traced(*arrays: Any) -> int:
        kind.add(cache, 0, "a", *arrays)
        return 0

    @jax.jit
    def traced_latents(*arrays: Any) -> int:
        kind.add_held(cache, 0, "a", *arrays)
        return 0

    for call, arrays in (
        (traced, [jax.numpy.asarray(x) for x in kind.inputs(0, [0])]),
        (traced_latents, kind.held(cache, 0, "a")),
    ):
        with pytest.raises(NamespaceError, match="traced"):
            call(*arrays)
    assert cache.seq_len(0, "a") == 0


def test_repr(xp: Any, kind: Kind) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 0, "a", [0])
    text = repr(cache)
    for part in ("2 layers", "float32", "1 sequences", "8 of 9 blocks of 4 tokens free"):
        assert part in text
    assert str(cache.device) in text


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
def test_copies_are_independent(xp: Any, kind: Kind, duplicate: Any) -> None:
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    rows = kind.append(xp, cache, 0, "a", list(range(6)))
    cache.fork("a", "b")
    other = duplicate(cache)
    assert state(xp, kind, other) == state(xp, kind, cache)
    before = state(xp, kind, cache)
    longer = rows + kind.append(xp, other, 0, "a", [6, 7, 8])
    assert state(xp, kind, cache) == before
    check(xp, kind, other, 0, "a", longer)
    cache.free_sequence("a")
    cache.free_sequence("b")
    poison(xp, cache, cache._blocks.free)
    check(xp, kind, other, 0, "a", longer)
    check(xp, kind, other, 0, "b", rows)
    assert other.allocate_sequence() == cache.allocate_sequence()


@pytest.mark.parametrize("options", [{"num_blocks": 0}, {"block_size": 0}, {"num_blocks": 2**31}])
def test_wrong_numbers_of_blocks(xp: Any, kind: Kind, options: Any) -> None:
    with pytest.raises(SettingError):
        kind.make(xp, **options)


def swap(kind: Kind) -> tuple[Any, Any]:
    """Compress and decompress of what a kind of cache holds, as methods of the compressor."""
    compressor = KVCacheCompressor(LowRank(1), value_method=LowRank(1), sinks=1, window=2)
    if kind.name == "paged":
        return compressor.compress_paged_cache, compressor.decompress_to_paged_cache
    return compressor.compress_mla_cache, compressor.decompress_to_mla_cache


def test_swapped_out_and_back(xp: Any, kind: Kind) -> None:
    out, back = swap(kind)
    cache = kind.make(xp)
    cache.allocate_sequence("other")
    other = kind.append(xp, cache, 0, "other", [100, 101])
    cache.allocate_sequence("swapped")
    for layer in range(LAYERS):
        kind.append(xp, cache, layer, "swapped", list(range(11)))
    before = state(xp, kind, cache)

    stored = [out(cache, layer, "swapped") for layer in range(LAYERS)]
    layout = KVLayout.UNBATCHED if kind.name == "paged" else KVLayout.LATENT
    assert all(compressed.layout is layout for compressed in stored)
    assert state(xp, kind, cache) == before
    held = [xp.numpy(kind.held(cache, 0, "swapped")[0])]
    cache.free_sequence("swapped")
    poison(xp, cache, cache._blocks.free)

    cache.allocate_sequence("back")
    for layer, compressed in enumerate(stored):
        back(compressed, cache, layer, "back")
        compressor = out.__self__
        direct = compressor._decompress(compressed, layout)
        for got, expected in zip(kind.held(cache, layer, "back"), direct, strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(xp.numpy(got), xp.numpy(expected))
    got = xp.numpy(kind.held(cache, 0, "back")[0])
    for exact in (slice(0, 1), slice(9, 11)):
        np.testing.assert_array_equal(got[:, exact], held[0][:, exact])
    kind.append(xp, cache, 0, "back", [11])
    assert cache.seq_len(0, "back") == 12
    check(xp, kind, cache, 0, "other", other)


def test_a_cache_too_small_to_swap_in(xp: Any, kind: Kind) -> None:
    out, back = swap(kind)
    large, small = kind.make(xp), kind.make(xp, num_blocks=2)
    large.allocate_sequence("a")
    small.allocate_sequence("a")
    kind.append(xp, large, 0, "a", list(range(11)))
    kind.append(xp, small, 0, "a", [7])
    compressed, before = out(large, 0, "a"), state(xp, kind, small)
    with pytest.raises(OutOfBlocks):
        back(compressed, small, 0, "a")
    assert state(xp, kind, small) == before
    for call in (
        lambda: out(large, "a", 0),
        lambda: back(compressed, large, "a", 0),
    ):
        with pytest.raises(UnknownLayer):
            call()
    for call in (lambda: out(large, "a"), lambda: back(compressed, large, "a")):
        with pytest.raises(TypeError, match="seq_id"):  # no layer is assumed
            call()
