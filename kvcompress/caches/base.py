"""`BlockCache`: what caches in blocks have in common."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from kvcompress.arrays import Array, Namespace, array_namespace, detach, device, library_name
from kvcompress.caches.blocks import BlockManager
from kvcompress.caches.pools import Pools, slots_of
from kvcompress.errors import UnknownSequence
from kvcompress.ops.slots import Paged


class BlockCache:
    """Base of the caches in blocks (PagedAttention, Kwon et al. 2023, arXiv 2309.06180).

    Parameters
    ----------
    num_blocks, block_size : int
    sizes : sequence of (int, int, int)
        Of every layer: heads, width of what is held as keys, width of what is held as values.
    dtype : str
    xp : namespace
    device : optional

    Raises
    ------
    SettingError, DTypeError
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        sizes: Sequence[tuple[int, int, int]],
        *,
        dtype: str,
        xp: Namespace,
        device: Any = None,
    ) -> None:
        self._blocks = BlockManager(len(sizes), num_blocks, block_size)
        slots = num_blocks * block_size
        self._keys, self._values = (
            Pools(slots, shapes, dtype=dtype, xp=xp, device=device)
            for shapes in (
                [(heads, width) for heads, width, _ in sizes],
                [(heads, width) for heads, _, width in sizes],
            )
        )
        self.dtype = dtype

    def _described(self) -> str:
        """Library, device, sequences and blocks, for ``repr``."""
        return (
            f"{self.dtype}, {library_name(array_namespace(self._keys[0]))} on {self.device}, "
            f"{len(self._blocks.sequences)} sequences, {self.num_free_blocks} of "
            f"{self.num_total_blocks} blocks of {self.block_size} tokens free"
        )

    @property
    def num_layers(self) -> int:
        """Layers of the cache."""
        return self._blocks.num_layers

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._blocks.block_size

    @property
    def num_total_blocks(self) -> int:
        """Blocks of the cache, free or not."""
        return self._blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._blocks.free)

    @property
    def device(self) -> Any:
        """Device of the pools."""
        return device(self._keys[0])

    def allocate_sequence(self, seq_id: Hashable = None) -> Hashable:
        """Begin an empty sequence; it takes no block yet.

        Parameters
        ----------
        seq_id : hashable, optional
            Its identifier. If it is left out, the sequence gets an integer that no sequence of
            this cache has had, and that is no index of a layer.

        Returns
        -------
        hashable
            The identifier.

        Raises
        ------
        SequenceExists
            If the identifier is in use.
        UnknownSequence
            If the identifier is not hashable.
        """
        return self._blocks.allocate(seq_id)

    def fork(self, seq_id: Hashable, new_seq_id: Hashable = None) -> Hashable:
        """Begin a sequence with the tokens of another, sharing its blocks until one is written.

        Parameters
        ----------
        seq_id : hashable
            The sequence whose tokens are shared.
        new_seq_id : hashable, optional
            The identifier of the new sequence; see `allocate_sequence`.

        Returns
        -------
        hashable
            The identifier of the new sequence.

        Raises
        ------
        UnknownSequence
            If there is no sequence `seq_id`, or `new_seq_id` is not hashable.
        SequenceExists
            If `new_seq_id` is in use.
        """
        return self._blocks.fork(seq_id, new_seq_id)

    def truncate(self, seq_id: Hashable, length: int) -> None:
        """Forget the tokens of a sequence from `length` on, in all layers.

        Layers that are not longer stay as they are.

        Raises
        ------
        UnknownSequence
            If there is no such sequence.
        SettingError
            If `length` is not an integer of at least 0.
        """
        self._blocks.truncate(seq_id, length)

    def free_sequence(self, seq_id: Hashable) -> None:
        """Forget a sequence; blocks that no other sequence shares become free.

        Raises
        ------
        UnknownSequence
            If there is no such sequence, also because it was freed before.
        """
        self._blocks.release(seq_id)

    def seq_len(self, layer: int, seq_id: Hashable) -> int:
        """Return the number of tokens that one layer of a sequence holds.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        """
        return self._blocks.seq_len(layer, seq_id)

    def num_blocks(self, layer: int, seq_id: Hashable) -> int:
        """Return the number of blocks that hold the tokens of one layer of a sequence.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        """
        return self._blocks.blocks_of(self.seq_len(layer, seq_id))

    def block_table(self, seq_id: Hashable) -> tuple[int, ...]:
        """Return the blocks of a sequence: token ``t`` is in block ``t // block_size`` of them.

        Layers share the table, which is as long as the longest layer needs.

        Raises
        ------
        UnknownSequence
            If there is no such sequence.
        """
        return tuple(self._blocks.sequence(seq_id).table)

    def get_kv(self, layer: int, seq_id: Hashable) -> tuple[Array, Array]:
        """Return the keys and values of one layer of a sequence, as new arrays.

        Returns
        -------
        k : array ``[num_heads, seq_len, head_dim]``
        v : array ``[num_heads, seq_len, value_head_dim]``

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        """
        return self._restore(layer, *self._read(layer, seq_id))

    def iter_kv_blocks(self, layer: int, seq_id: Hashable) -> Iterator[tuple[Array, Array]]:
        """Return an iterator over the keys and values of one layer of a sequence, block by block.

        Yields
        ------
        k : array ``[num_heads, tokens, head_dim]``
        v : array ``[num_heads, tokens, value_head_dim]``
            New arrays of up to `block_size` tokens, in order; together they are what `get_kv`
            returns.

        Raises
        ------
        UnknownLayer, UnknownSequence
            At once, if there is no such layer or sequence; later, if the sequence is freed
            meanwhile.
        """
        layer, sequence = self._blocks.layer(layer), self._blocks.sequence(seq_id)

        def blocks() -> Iterator[tuple[Array, Array]]:
            for start in itertools.count(0, self.block_size):
                if self._blocks.sequence(seq_id) is not sequence:
                    raise UnknownSequence(
                        f"sequence {seq_id!r} was freed while its blocks were read"
                    )
                stop = min(start + self.block_size, sequence.lengths[layer])
                if stop <= start:
                    return
                yield self._restore(layer, *self._read(layer, seq_id, start, stop))

        return blocks()

    def _restore(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values from what is held as such."""
        return k, v

    def _index(
        self, layer: int, seq_id: Hashable, start: int = 0, stop: int | None = None
    ) -> Array:
        """Slots of the tokens from `start` to `stop`, or to the end."""
        stop = self.seq_len(layer, seq_id) if stop is None else stop
        table = self._blocks.sequence(seq_id).table
        return self._keys.index(slots_of(table, self.block_size, start, stop))

    def _read(
        self, layer: int, seq_id: Hashable, start: int = 0, stop: int | None = None
    ) -> tuple[Array, Array]:
        """Copy what is held as keys and values of the tokens from `start` to `stop`."""
        index = self._index(layer, seq_id, start, stop)
        return self._keys.read(layer, index), self._values.read(layer, index)

    def _paged(self, layer: int, seq_id: Hashable) -> tuple[Paged, Paged]:
        """What is held as keys and values, where it is."""
        index = self._index(layer, seq_id)
        return self._keys.paged(layer, index), self._values.paged(layer, index)

    def _append(self, layer: int, seq_id: Hashable, k: Array, v: Array) -> None:
        """Append what is held as keys and values, which was checked before."""
        append = self._blocks.plan(layer, seq_id, k.shape[1])
        if append.start == append.stop:
            return
        pools, size = (self._keys, self._values), self.block_size
        # Nothing written here can be read before the table and the length say so.
        if append.sources:
            source, target = (
                self._keys.index(slots_of(blocks, size, 0, len(blocks) * size))
                for blocks in (append.sources, append.targets)
            )
            for pool in pools:
                pool.copy(source, target)
        index = self._keys.index(slots_of(append.table, size, append.start, append.stop))
        for pool, x in zip(pools, (k, v), strict=True):
            pool.write(append.layer, index, detach(x))
        self._blocks.commit(append)
