"""Which tokens are in which blocks: tables, lengths, reference counts and the free list.

Bookkeeping alone, without arrays, which every cache in blocks shares.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from kvcompress.errors import (
    OutOfBlocks,
    SequenceExists,
    UnknownLayer,
    UnknownSequence,
    check_integer,
)

ORDER = "the order of the arguments is (layer, seq_id)"


@dataclass(eq=False)
class TokenSequence:
    """Where the tokens of a sequence are: the same blocks in all layers, filled layer by layer."""

    table: list[int]
    lengths: list[int]


@dataclass(frozen=True, eq=False)
class Append:
    """How tokens will be appended: what to copy, and where to write; nothing is changed yet.

    Attributes
    ----------
    start, stop : int
        Positions of the new tokens, the second one excluded.
    table : list of int
        Blocks of the sequence once the tokens are appended.
    sources, targets : list of int
        Blocks that are shared and will be written to, and the blocks that they are copied to.
    fresh : list of int
        Blocks that are taken from the free list, `targets` included.
    """

    layer: int
    sequence: TokenSequence
    start: int
    stop: int
    table: list[int]
    sources: list[int]
    targets: list[int]
    fresh: list[int]


class BlockManager:
    """Sequences of tokens in blocks, which forked sequences share until one of them writes.

    Every error is raised before anything changes.

    Parameters
    ----------
    num_layers, num_blocks, block_size : int
        At least 1; ``num_blocks * block_size`` is less than 2**31, for slots are int32.

    Raises
    ------
    SettingError
        If a number is out of range.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_size: int) -> None:
        check_integer("num_layers", num_layers, 1)
        check_integer("block_size", block_size, 1, 2**31 - 1)
        check_integer("num_blocks", num_blocks, 1, (2**31 - 1) // block_size)
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.sequences: dict[Hashable, TokenSequence] = {}
        self.references = [0] * num_blocks
        self.free = list(range(num_blocks))[::-1]
        # Above all layers, so that a swapped layer and identifier are always told apart.
        self._next_id = num_layers

    def layer(self, layer: Any) -> int:
        """Return `layer` as an int.

        Raises
        ------
        UnknownLayer
            If it is no integer, or there is no such layer.
        """
        # Neither True nor a tensor, which would be taken for an index as well.
        integer = isinstance(layer, Integral) and not isinstance(layer, bool)
        index = operator.index(layer) if integer else -1
        if not 0 <= index < self.num_layers:
            raise UnknownLayer(
                f"layer must be an integer from 0 to {self.num_layers - 1}, "
                f"got {_shown(layer)}; {ORDER}"
            )
        return index

    def sequence(self, seq_id: Hashable) -> TokenSequence:
        """Return the record of a sequence.

        Raises
        ------
        UnknownSequence
        """
        try:
            return self.sequences[seq_id]
        except KeyError:
            raise UnknownSequence(
                f"there is no sequence {_shown(seq_id)}: it was never allocated, or it has been "
                f"freed; {ORDER}"
            ) from None
        except TypeError:
            raise UnknownSequence(_unhashable(seq_id)) from None

    def seq_len(self, layer: Any, seq_id: Hashable) -> int:
        """Tokens that one layer of a sequence holds.

        Raises
        ------
        UnknownLayer, UnknownSequence
        """
        index = self.layer(layer)
        return self.sequence(seq_id).lengths[index]

    def blocks_of(self, length: int) -> int:
        """Blocks that `length` tokens take."""
        return -(-length // self.block_size)

    def allocate(self, seq_id: Hashable = None) -> Hashable:
        """Begin an empty sequence, and return its identifier.

        Raises
        ------
        SequenceExists, UnknownSequence
        """
        return self._add(seq_id, TokenSequence([], [0] * self.num_layers))

    def fork(self, seq_id: Hashable, new_seq_id: Hashable = None) -> Hashable:
        """Begin a sequence that shares the blocks of another, and return its identifier.

        Raises
        ------
        UnknownSequence, SequenceExists
        """
        sequence = self.sequence(seq_id)
        new_seq_id = self._add(new_seq_id, TokenSequence([*sequence.table], [*sequence.lengths]))
        for block in sequence.table:
            self.references[block] += 1
        return new_seq_id

    def plan(self, layer: Any, seq_id: Hashable, count: int) -> Append:
        """Plan to append `count` tokens to one layer of a sequence; `commit` carries it out.

        Raises
        ------
        UnknownLayer, UnknownSequence, OutOfBlocks
        """
        index, sequence = self.layer(layer), self.sequence(seq_id)
        start = sequence.lengths[index]
        stop = start + count
        held = len(sequence.table)
        first, end = start // self.block_size, self.blocks_of(stop) if count else 0
        shared = [i for i in range(first, min(end, held)) if self.references[sequence.table[i]] > 1]
        fresh = self._peek(len(shared) + max(end - held, 0))
        targets, added = fresh[: len(shared)], fresh[len(shared) :]
        table = [*sequence.table, *added]
        for i, block in zip(shared, targets, strict=True):
            table[i] = block
        sources = [sequence.table[i] for i in shared]
        return Append(index, sequence, start, stop, table, sources, targets, fresh)

    def commit(self, append: Append) -> None:
        """Carry out what `plan` returned; nothing may have been changed since."""
        del self.free[len(self.free) - len(append.fresh) :]
        for block in append.fresh:
            self.references[block] = 1
        for block in append.sources:
            self.references[block] -= 1
        append.sequence.table = append.table
        append.sequence.lengths[append.layer] = append.stop

    def truncate(self, seq_id: Hashable, length: int) -> None:
        """Forget the tokens of a sequence from `length` on, in all layers.

        Raises
        ------
        UnknownSequence, SettingError
        """
        sequence = self.sequence(seq_id)
        check_integer("length", length, 0)
        sequence.lengths = [min(old, length) for old in sequence.lengths]
        keep = self.blocks_of(max(sequence.lengths))
        self._release(sequence.table[keep:])
        del sequence.table[keep:]

    def release(self, seq_id: Hashable) -> None:
        """Forget a sequence; blocks that no other sequence shares become free.

        Raises
        ------
        UnknownSequence
        """
        sequence = self.sequence(seq_id)
        del self.sequences[seq_id]
        self._release(sequence.table)

    def _add(self, seq_id: Hashable, sequence: TokenSequence) -> Hashable:
        """Hold `sequence` under `seq_id`, or under a fresh integer where that is None."""
        if seq_id is None:
            while self._next_id in self.sequences:
                self._next_id += 1
            seq_id = self._next_id
        try:
            if seq_id in self.sequences:
                raise SequenceExists(
                    f"sequence {_shown(seq_id)} is in use; free it, or choose another identifier"
                )
        except TypeError:
            raise UnknownSequence(_unhashable(seq_id)) from None
        self.sequences[seq_id] = sequence
        # Never hand out an integer that has named another sequence before.
        named: Any = seq_id
        if isinstance(named, Integral):
            self._next_id = max(self._next_id, int(named) + 1)
        return seq_id

    def _peek(self, count: int) -> list[int]:
        """The `count` blocks that will be handed out next, in the order of their numbers."""
        if count > len(self.free):
            raise OutOfBlocks(
                f"the new tokens need {count} more blocks of {self.block_size} tokens, but only "
                f"{len(self.free)} of {self.num_blocks} are free; free or truncate a sequence"
            )
        return sorted(self.free[len(self.free) - count :])

    def _release(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block]:
                self.free.append(block)


def _shown(value: Any) -> str:
    """`value` for a message; only its type if that is long, as of an array."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"an object of {type(value)}"


def _unhashable(seq_id: Any) -> str:
    return f"a sequence identifier must be hashable, got {_shown(seq_id)}; {ORDER}"
