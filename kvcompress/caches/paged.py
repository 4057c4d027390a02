"""`PagedKVCache`: keys and values in blocks of tokens, shared between sequences until written."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress.arrays import (
    FLOATING,
    Array,
    array_namespace,
    device,
    dtype_name,
    dtype_of,
    is_concrete,
    library_name,
    namespace_of,
)
from kvcompress.backend import select
from kvcompress.errors import (
    DTypeError,
    NamespaceError,
    OutOfBlocks,
    SequenceExists,
    ShapeError,
    UnknownLayer,
    UnknownSequence,
    check_integer,
)
from kvcompress.ops.slots import Paged, gather_slots, scatter_slots


@dataclass
class _Sequence:
    """Where the tokens of a sequence are: the same blocks in all layers, filled layer by layer."""

    table: list[int]
    lengths: list[int]


class PagedKVCache:
    """A cache of keys and values in blocks (PagedAttention, Kwon et al. 2023, arXiv 2309.06180).

    Every layer has a pool of keys and one of values, ``[num_blocks * block_size, num_kv_heads,
    head_dim]``, allocated at once. A sequence owns a table of blocks, the same in all layers; each
    layer has its own length, since a model appends layer by layer. Forked sequences share blocks,
    which are copied when one of them writes.

    What is read is a copy, but for `paged_kv`. Blocks that were freed are not erased, but cannot be
    read. Every error is raised before anything changes. Arrays that cannot be written in place
    (JAX) are replaced as a whole: an append then costs a copy of the layer's pool. One thread at a
    time.

    Parameters
    ----------
    num_layers, num_blocks, num_kv_heads, head_dim : int
        At least 1.
    block_size : int
        Tokens in a block.
    value_head_dim : int, optional
        head_dim of the values, if it is not that of the keys.
    dtype : {"float16", "bfloat16", "float32"}
    xp : module
        The array library: ``numpy``, ``jax.numpy``, ``torch``, ``cupy``, ...
    device : optional
        A device of that library; None is its default.

    Raises
    ------
    SettingError, DTypeError, NamespaceError
        If a size, the dtype or the library cannot be used.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        value_head_dim: int | None = None,
        dtype: str = "float16",
        xp: Any = np,
        device: Any = None,
    ) -> None:
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_integer("num_layers", num_layers, 1)
        check_integer("block_size", block_size, 1)
        check_integer("num_blocks", num_blocks, 1, (2**31 - 1) // block_size)  # int32 indices
        check_integer("num_kv_heads", num_kv_heads, 1)
        check_integer("head_dim", head_dim, 1)
        check_integer("value_head_dim", value_head_dim, 1)
        if dtype not in FLOATING:
            raise DTypeError(f"dtype must be one of {', '.join(FLOATING)}, got {dtype!r}")
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.block_size = block_size
        self.dtype = dtype
        self._xp = namespace_of(xp)

        def pools(channels: int) -> list[Array]:
            shape = (num_blocks * block_size, num_kv_heads, channels)
            kind = dtype_of(self._xp, dtype)
            return [self._xp.zeros(shape, dtype=kind, device=device) for _ in range(num_layers)]

        self._keys = pools(head_dim)
        self._values = pools(value_head_dim)
        self._sequences: dict[Hashable, _Sequence] = {}
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks))[::-1]

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.num_layers} layers, {self.num_kv_heads} KV heads, head_dim "
            f"{self.head_dim}, {self.dtype}, {library_name(self._xp)} on {self.device}, "
            f"{len(self._sequences)} sequences, {self.num_free_blocks} of {self.num_blocks} "
            f"blocks of {self.block_size} tokens free)"
        )

    @property
    def device(self) -> Any:
        """Device of the pools."""
        return device(self._keys[0])

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    def allocate_sequence(self, seq_id: Hashable) -> None:
        """Begin an empty sequence; it takes no block yet.

        Raises
        ------
        SequenceExists
            If the identifier is in use.
        """
        self._check_new(seq_id)
        self._sequences[seq_id] = _Sequence([], [0] * self.num_layers)

    def append(self, seq_id: Hashable, layer: int, k: Array, v: Array, /) -> None:
        """Append the keys and values of new tokens to one layer, wholly or not at all.

        Parameters
        ----------
        seq_id : hashable
        layer : int
        k, v : arrays ``[num_kv_heads, new tokens, head_dim]``
            Of the library, the dtype and on the device of the cache.

        Raises
        ------
        UnknownSequence, UnknownLayer, NamespaceError, ShapeError, DTypeError
        OutOfBlocks
            If there are too few free blocks for the tokens and for the copies of shared blocks
            that they would be written to.
        """
        start = self.seq_len(seq_id, layer)
        self._check_arrays(k, v)
        stop = start + k.shape[1]
        if stop == start:
            return
        sequence = self._sequences[seq_id]
        first, end = start // self.block_size, -(-stop // self.block_size)
        shared = [
            i
            for i in range(first, min(end, len(sequence.table)))
            if self._references[sequence.table[i]] > 1
        ]
        fresh = self._peek_free(len(shared) + max(end - len(sequence.table), 0))
        copies, added = fresh[: len(shared)], fresh[len(shared) :]
        table = [*sequence.table, *added]
        for i, block in zip(shared, copies, strict=True):
            table[i] = block

        # Nothing written here can be read before the table and the length say so.
        self._copy_blocks([sequence.table[i] for i in shared], copies)
        self._write(layer, self._slots(table, start, stop), k, v)

        del self._free[len(self._free) - len(fresh) :]
        for block in fresh:
            self._references[block] = 1
        for i in shared:
            self._references[sequence.table[i]] -= 1
        sequence.table = table
        sequence.lengths[layer] = stop

    def get_kv(self, seq_id: Hashable, layer: int) -> tuple[Array, Array]:
        """Keys and values of a sequence in one layer, copied.

        Returns
        -------
        k, v : arrays ``[num_kv_heads, seq_len, head_dim]``

        Raises
        ------
        UnknownSequence, UnknownLayer
        """
        return self._read(seq_id, layer, 0, self.seq_len(seq_id, layer))

    def paged_kv(self, seq_id: Hashable, layer: int) -> tuple[Paged, Paged]:
        """Keys and values of a sequence in one layer where they are, not copied.

        Returns
        -------
        k, v : Paged ``[num_kv_heads, seq_len, head_dim]``
            To be read before anything else is done to the cache.

        Raises
        ------
        UnknownSequence, UnknownLayer
        """
        return self._paged(seq_id, layer, 0, self.seq_len(seq_id, layer))

    def iter_kv_blocks(self, seq_id: Hashable, layer: int) -> Iterator[tuple[Array, Array]]:
        """Keys and values of a sequence in one layer, copied block by block, in order.

        Yields
        ------
        k, v : arrays ``[num_kv_heads, tokens, head_dim]``
            Up to `block_size` tokens.

        Raises
        ------
        UnknownSequence, UnknownLayer
            At once; later only if the sequence is freed meanwhile.
        """
        self.seq_len(seq_id, layer)  # a generator would raise only when it is first asked

        def blocks() -> Iterator[tuple[Array, Array]]:
            start = 0
            while start < (length := self.seq_len(seq_id, layer)):
                yield self._read(seq_id, layer, start, min(start + self.block_size, length))
                start += self.block_size

        return blocks()

    def seq_len(self, seq_id: Hashable, layer: int = 0) -> int:
        """Tokens that one layer of a sequence holds.

        Raises
        ------
        UnknownSequence, UnknownLayer
        """
        lengths = self._sequence(seq_id).lengths
        if layer not in range(self.num_layers):
            raise UnknownLayer(f"layer must be from 0 to {self.num_layers - 1}, got {layer!r}")
        return lengths[layer]

    def block_table(self, seq_id: Hashable) -> tuple[int, ...]:
        """Blocks of a sequence in the order of its tokens: token ``t`` is in ``t // block_size``.

        Raises
        ------
        UnknownSequence
        """
        return tuple(self._sequence(seq_id).table)

    def fork(self, seq_id: Hashable, new_seq_id: Hashable) -> None:
        """Begin a sequence with the tokens of another, sharing its blocks until one is written.

        Raises
        ------
        UnknownSequence
            If there is no sequence `seq_id`.
        SequenceExists
            If `new_seq_id` is in use.
        """
        sequence = self._sequence(seq_id)
        self._check_new(new_seq_id)
        self._sequences[new_seq_id] = _Sequence([*sequence.table], [*sequence.lengths])
        for block in sequence.table:
            self._references[block] += 1

    def truncate(self, seq_id: Hashable, length: int) -> None:
        """Forget the tokens of a sequence from `length` on, in all layers.

        Layers that are not longer stay as they are.

        Raises
        ------
        UnknownSequence
        SettingError
            If `length` is no integer of at least 0.
        """
        sequence = self._sequence(seq_id)
        check_integer("length", length, 0)
        sequence.lengths = [min(old, length) for old in sequence.lengths]
        keep = -(-max(sequence.lengths) // self.block_size)
        self._release(sequence.table[keep:])
        del sequence.table[keep:]

    def free_sequence(self, seq_id: Hashable) -> None:
        """Forget a sequence; blocks that no other sequence shares become free.

        Raises
        ------
        UnknownSequence
            Also if it was freed before.
        """
        sequence = self._sequence(seq_id)
        del self._sequences[seq_id]
        self._release(sequence.table)

    def _sequence(self, seq_id: Hashable) -> _Sequence:
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise UnknownSequence(
                f"no sequence {seq_id!r}: it was never allocated, or has been freed"
            ) from None

    def _check_new(self, seq_id: Hashable) -> None:
        if seq_id in self._sequences:
            raise SequenceExists(f"sequence {seq_id!r} is in use; free it, or choose another name")

    def _check_arrays(self, k: Array, v: Array) -> None:
        library = library_name(self._xp)
        if array_namespace(k, v) is not self._xp:
            raise NamespaceError(
                f"the cache holds arrays of {library}, got {library_name(array_namespace(k, v))}"
            )
        channels = {"k": self.head_dim, "v": self.value_head_dim}
        for (name, expected), x in zip(channels.items(), (k, v), strict=True):
            if x.ndim != 3 or (x.shape[0], x.shape[2]) != (self.num_kv_heads, expected):
                raise ShapeError(
                    f"{name} must be [{self.num_kv_heads}, new tokens, {expected}], "
                    f"got shape {tuple(x.shape)}"
                )
            if dtype_name(x.dtype) != self.dtype:
                raise DTypeError(
                    f"{name} must have the cache's dtype {self.dtype}, got {dtype_name(x.dtype)}"
                )
            if not is_concrete(x):
                raise NamespaceError(f"{name} is traced by a compiler; a cache holds real arrays")
            if device(x) != self.device:
                raise NamespaceError(
                    f"{name} must be on the cache's device {self.device}, got {device(x)}"
                )
        if k.shape[1] != v.shape[1]:
            raise ShapeError(
                f"k and v must have as many new tokens, got {k.shape[1]} and {v.shape[1]}"
            )

    def _peek_free(self, count: int) -> list[int]:
        """The `count` blocks that will be handed out next, in the order of their numbers."""
        if count > len(self._free):
            raise OutOfBlocks(
                f"{count} blocks of {self.block_size} tokens are needed, "
                f"{len(self._free)} of {self.num_blocks} are free; free or truncate a sequence"
            )
        return sorted(self._free[len(self._free) - count :])

    def _release(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def _slots(self, table: Sequence[int], start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows of the pools that hold the tokens from `start` to `stop`."""
        token = np.arange(start, stop, dtype=np.int32)
        block, offset = np.divmod(token, np.int32(self.block_size))
        return np.asarray(table, dtype=np.int32)[block] * np.int32(self.block_size) + offset

    def _paged(self, seq_id: Hashable, layer: int, start: int, stop: int) -> tuple[Paged, Paged]:
        slots = self._index(self._slots(self._sequences[seq_id].table, start, stop))
        return Paged(self._keys[layer], slots), Paged(self._values[layer], slots)

    def _read(self, seq_id: Hashable, layer: int, start: int, stop: int) -> tuple[Array, Array]:
        dispatch = select()
        k, v = (dispatch.array(x) for x in self._paged(seq_id, layer, start, stop))
        return k, v

    def _write(self, layer: int, slots: np.ndarray[Any, Any], k: Array, v: Array) -> None:
        dispatch, index = select(), self._index(slots)
        for pool, x in ((self._keys, k), (self._values, v)):
            pool[layer] = dispatch(scatter_slots, pool[layer], index, x)

    def _copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, in all layers."""
        if not sources:
            return
        dispatch, size = select(), self.block_size
        source = self._index(self._slots(sources, 0, len(sources) * size))
        target = self._index(self._slots(targets, 0, len(targets) * size))
        for pool in (self._keys, self._values):
            for layer, rows in enumerate(pool):
                copied = dispatch(gather_slots, rows, source)
                pool[layer] = dispatch(scatter_slots, rows, target, copied)

    def _index(self, rows: np.ndarray[Any, Any]) -> Array:
        return self._xp.asarray(rows, device=self.device)
