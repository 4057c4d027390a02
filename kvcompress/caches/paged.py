"""`PagedKVCache`: keys and values in blocks of tokens, shared between sequences until written."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from kvcompress.arrays import FLOATING, Array, namespace_of
from kvcompress.caches.base import BlockCache
from kvcompress.caches.pools import check_tokens
from kvcompress.errors import DTypeError, check_integer
from kvcompress.ops.slots import Paged


class PagedKVCache(BlockCache):
    """A cache of keys and values in blocks (PagedAttention, Kwon et al. 2023, arXiv 2309.06180).

    Every layer has a pool of keys and one of values, ``[num_blocks * block_size, num_kv_heads,
    head_dim]``, allocated at once. A sequence owns a table of blocks, the same in all layers; each
    layer has its own length, since a model appends layer by layer. Forked sequences share blocks,
    which are copied when one of them writes.

    What is read is a copy, but for `paged_kv`; what is appended is copied without its gradients.
    Blocks that were freed are not erased, but cannot be read. Every error is raised before
    anything changes. Arrays that cannot be written in place (JAX) are replaced as a whole: an
    append then costs a copy of the layer's pool. A cache can be pickled and deep-copied. It is
    for one thread at a time.

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
        check_integer("num_kv_heads", num_kv_heads, 1)
        check_integer("head_dim", head_dim, 1)
        check_integer("value_head_dim", value_head_dim, 1)
        if dtype not in FLOATING:
            raise DTypeError(f"dtype must be one of {', '.join(FLOATING)}, got {dtype!r}")
        sizes = [(num_kv_heads, head_dim, value_head_dim)] * num_layers
        super().__init__(
            num_blocks, block_size, sizes, dtype=dtype, xp=namespace_of(xp), device=device
        )
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.num_layers} layers, {self.num_kv_heads} KV heads, head_dim "
            f"{self.head_dim}, {self._described()})"
        )

    def append(self, layer: int, seq_id: Hashable, k: Array, v: Array, /) -> None:
        """Append the keys and values of new tokens to one layer of a sequence, all or none.

        Parameters
        ----------
        layer : int
        seq_id : hashable
        k : array ``[num_kv_heads, new tokens, head_dim]``
        v : array ``[num_kv_heads, new tokens, value_head_dim]``
            Both of the library and dtype and on the device of the cache.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        NamespaceError, ShapeError, DTypeError
            If the arrays do not fit the cache.
        OutOfBlocks
            If there are too few free blocks for the tokens and for the copies of shared blocks
            that they would be written to.
        """
        self.seq_len(layer, seq_id)
        check_tokens(k, v, self._keys[0], self.num_kv_heads, self.head_dim, self.value_head_dim)
        self._append(layer, seq_id, k, v)

    def paged_kv(self, layer: int, seq_id: Hashable) -> tuple[Paged, Paged]:
        """Return the keys and values of one layer of a sequence where they are, not copied.

        Returns
        -------
        k : Paged ``[num_kv_heads, seq_len, head_dim]``
        v : Paged ``[num_kv_heads, seq_len, value_head_dim]``
            To be read before anything else is done to the cache.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        """
        return self._paged(layer, seq_id)
