"""Every kind of cache against lists of rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cache_kinds import BLOCK, BLOCKS, KINDS, LAYERS, Kind, Row, poison, stack, state
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

from kvcompress.errors import (
    OutOfBlocks,
    SequenceExists,
    SettingError,
    ShapeError,
    UnknownLayer,
    UnknownSequence,
)


@dataclass
class Read:
    """What a cache gave back once, and copies of it."""

    arrays: tuple[Any, ...]
    copies: tuple[np.ndarray, ...]


class CacheMachine(RuleBasedStateMachine):
    """A cache against plain lists of rows, one per sequence and layer."""

    live = Bundle("live")
    dead = Bundle("dead")
    layers = st.integers(0, LAYERS - 1)

    def __init__(self, xp: Any, kind: Kind) -> None:
        super().__init__()
        self.xp, self.kind = xp, kind
        self.cache = kind.make(xp)
        self.model: dict[Any, list[list[Row]]] = {}
        self.reads: list[Read] = []
        self.tokens = 0
        self.names: list[Any] = []

    def named(self, name: Any, got: Any) -> Any:
        """What `allocate_sequence` and `fork` return, given a name or none."""
        if name is None:
            assert type(got) is int
            assert got >= LAYERS
            assert got not in self.names
            assert got > max((n for n in self.names if isinstance(n, int)), default=-1)
        else:
            assert got == name
        self.names.append(got)
        return got

    def new_name(self, given: str | int | None) -> Any:
        return f"{given} {len(self.names)}" if isinstance(given, str) else given

    def fresh_tokens(self, count: int) -> list[int]:
        self.tokens += count
        return list(range(self.tokens - count, self.tokens))

    names_given = st.sampled_from([None, "named"])

    @rule(target=live, given=names_given)
    def allocate(self, given: Any) -> Any:
        name = self.new_name(given)
        name = self.named(name, self.cache.allocate_sequence(name))
        self.model[name] = [[] for _ in range(LAYERS)]
        return name

    @rule(target=live, ahead=st.integers(0, 2))
    def allocate_an_integer(self, ahead: int) -> Any:
        """One that would be handed out later."""
        name = max((n for n in self.names if isinstance(n, int)), default=LAYERS) + 1 + ahead
        self.named(name, self.cache.allocate_sequence(name))
        self.model[name] = [[] for _ in range(LAYERS)]
        return name

    @rule(name=live, layers=st.sampled_from([[0], [1], [0, 1]]), count=st.integers(0, 6))
    def append(self, name: Any, layers: list[int], count: int) -> None:
        for layer in layers:
            tokens = self.fresh_tokens(count)
            if self.blocks_needed(name, layer, count) > self.cache.num_free_blocks:
                before = self.state()
                with pytest.raises(OutOfBlocks):
                    self.kind.append(self.xp, self.cache, layer, name, tokens)
                assert self.state() == before
            else:
                rows = self.kind.append(self.xp, self.cache, np.int64(layer), name, tokens)
                self.model[name][layer] += rows

    @rule(name=live, layer=layers, count=st.integers(0, 3))
    def append_what_is_held(self, name: Any, layer: int, count: int) -> None:
        """Latents, where the cache holds some, from elsewhere."""
        if self.blocks_needed(name, layer, count) > self.cache.num_free_blocks:
            return
        rows = [self.kind.row(layer, token, 7) for token in self.fresh_tokens(count)]
        held = self.kind.held(self.cache, layer, name)
        arrays = (
            self.xp.asarray(stack([row[i] for row in rows], held[i].shape[2], held[i].shape[0]))
            for i in range(2)
        )
        self.kind.add_held(self.cache, layer, name, *arrays)
        self.model[name][layer] += rows

    def blocks_needed(self, name: Any, layer: int, count: int) -> int:
        """New blocks, and copies of the shared ones that are written to."""
        table, start = self.cache.block_table(name), len(self.model[name][layer])
        touched = {position // BLOCK for position in range(start, start + count)}
        owners = self.owners()
        return sum(i >= len(table) or owners[table[i]] > 1 for i in touched)

    def owners(self) -> Counter[int]:
        return Counter(b for name in self.model for b in self.cache.block_table(name))

    def state(self) -> Any:
        return state(self.xp, self.kind, self.cache)

    @rule(target=live, name=live, given=names_given)
    def fork(self, name: Any, given: Any) -> Any:
        free, child = self.cache.num_free_blocks, self.new_name(given)
        child = self.named(child, self.cache.fork(name, child))
        assert self.cache.num_free_blocks == free
        self.model[child] = [list(rows) for rows in self.model[name]]
        return child

    @rule(name=live, length=st.integers(0, 12))
    def truncate(self, name: Any, length: int) -> None:
        self.cache.truncate(name, length)
        for rows in self.model[name]:
            del rows[length:]

    @rule(target=dead, name=consumes(live))
    def free(self, name: Any) -> Any:
        self.cache.free_sequence(name)
        del self.model[name]
        return name

    @rule(name=dead)
    def use_after_free(self, name: Any) -> None:
        before, cache = self.state(), self.cache
        for use in (
            lambda: cache.free_sequence(name),
            lambda: cache.block_table(name),
            lambda: cache.seq_len(0, name),
            lambda: cache.num_blocks(0, name),
            lambda: cache.get_kv(0, name),
            lambda: self.kind.held(cache, 0, name),
            lambda: cache.iter_kv_blocks(0, name),
            lambda: cache.truncate(name, 0),
            lambda: cache.fork(name, "child"),
            lambda: self.kind.append(self.xp, cache, 0, name, [0]),
        ):
            with pytest.raises(UnknownSequence, match=f"there is no sequence {name!r}"):
                use()
        assert self.state() == before

    @rule(name=live, other=live)
    def name_in_use(self, name: Any, other: Any) -> None:
        before = self.state()
        with pytest.raises(SequenceExists):
            self.cache.allocate_sequence(name)
        with pytest.raises(SequenceExists):
            self.cache.fork(other, name)
        assert self.state() == before

    @rule(name=live, layer=layers)
    def errors_change_nothing(self, name: Any, layer: int) -> None:
        before, cache = self.state(), self.cache
        (first, *others) = map(self.xp.asarray, self.kind.inputs(layer, [0, 1]))
        for error, call in (
            (UnknownLayer, lambda: self.kind.add(cache, name, layer, first, *others)),
            (UnknownLayer, lambda: cache.get_kv(name, layer)),
            (UnknownLayer, lambda: cache.seq_len(LAYERS, name)),
            (UnknownSequence, lambda: cache.allocate_sequence([name])),
            (SettingError, lambda: cache.truncate(name, -1)),
            (ShapeError, lambda: self.kind.add(cache, layer, name, first[..., :-1], *others)),
        ):
            with pytest.raises(error):
                call()
        assert self.state() == before

    @rule(name=live, layer=layers)
    def keep_what_was_read(self, name: Any, layer: int) -> None:
        arrays = *self.cache.get_kv(layer, name), *self.kind.held(self.cache, layer, name)
        self.reads.append(Read(arrays, tuple(map(self.xp.numpy, arrays))))

    @precondition(lambda self: self.reads)
    @rule()
    def what_was_read_stays(self) -> None:
        for read in self.reads:
            for x, copy in zip(read.arrays, read.copies, strict=True):
                np.testing.assert_array_equal(self.xp.numpy(x), copy)

    @rule(name=live, layer=layers)
    def get(self, name: Any, layer: int) -> None:
        rows = self.model[name][layer]
        self.kind.check_restored(self.xp, self.cache.get_kv(layer, name), layer, rows)

    @rule(name=live, layer=layers)
    def read_by_blocks(self, name: Any, layer: int) -> None:
        rows = self.model[name][layer]
        chunks = [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]
        blocks = list(self.cache.iter_kv_blocks(layer, name))
        assert len(blocks) == len(chunks) == self.cache.num_blocks(layer, name)
        for kv, chunk in zip(blocks, chunks, strict=True):
            self.kind.check_restored(self.xp, kv, layer, chunk)

    @invariant()
    def blocks_are_owned(self) -> None:
        owners, blocks = self.owners(), self.cache._blocks
        assert blocks.references == [owners[block] for block in range(BLOCKS)]
        assert sorted(blocks.free) == [block for block in range(BLOCKS) if not owners[block]]
        assert self.cache.num_free_blocks == len(blocks.free)
        for name, layers in self.model.items():
            table = self.cache.block_table(name)
            assert len(table) == len(set(table)) == math.ceil(max(map(len, layers)) / BLOCK)

    @invariant()
    def rows_are_those_of_the_sequence(self) -> None:
        poison(self.xp, self.cache, self.cache._blocks.free)
        for name, layers in self.model.items():
            for layer, rows in enumerate(layers):
                assert self.cache.seq_len(layer, name) == len(rows)
                assert self.cache.num_blocks(layer, name) == math.ceil(len(rows) / BLOCK)
                self.kind.check_held(self.xp, self.cache, layer, name, rows)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_against_lists_of_rows(xp: Any, kind: Kind) -> None:
    if xp.name == "jax-jit":
        pytest.skip("a cache is used eagerly")
    examples, steps = (40, 30) if xp.name == "numpy" else (3, 15)
    run_state_machine_as_test(
        lambda: CacheMachine(xp, kind),
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None),
    )
