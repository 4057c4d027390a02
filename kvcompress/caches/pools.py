"""The arrays that hold the tokens of a cache in blocks, one of keys and one of values a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcompress.arrays import (
    Array,
    HostArray,
    Namespace,
    array_namespace,
    check_array,
    device,
    dtype_name,
    dtype_of,
    is_concrete,
    library_name,
)
from kvcompress.backend import select
from kvcompress.errors import DTypeError, NamespaceError, ShapeError
from kvcompress.ops.slots import Paged, gather_slots, scatter_slots


class Pools:
    """One array ``[slots, heads, width]`` for every layer.

    Arrays that cannot be written in place (JAX) are replaced as a whole.

    Parameters
    ----------
    slots : int
    sizes : sequence of (int, int)
        Heads and width of every layer.
    dtype : str
    xp : namespace
    device : optional
    """

    def __init__(
        self,
        slots: int,
        sizes: Sequence[tuple[int, int]],
        *,
        dtype: str,
        xp: Namespace,
        device: Any = None,
    ) -> None:
        kind = dtype_of(xp, dtype)
        self.arrays = [xp.zeros((slots, *size), dtype=kind, device=device) for size in sizes]

    def __getitem__(self, layer: int) -> Array:
        return self.arrays[layer]

    def index(self, slots: HostArray) -> Array:
        """Slots as an array of the library, on the device of the pools."""
        xp, where = array_namespace(self.arrays[0]), device(self.arrays[0])
        return xp.asarray(slots, device=where)

    def paged(self, layer: int, index: Array) -> Paged:
        """Tokens of a layer, where they are."""
        return Paged.unchecked(self.arrays[layer], index)

    def read(self, layer: int, index: Array) -> Array:
        """Tokens of a layer ``[heads, tokens, width]``, copied."""
        return select()(gather_slots, self.arrays[layer], index)

    def write(self, layer: int, index: Array, x: Array) -> None:
        """Overwrite tokens of a layer by `x` ``[heads, tokens, width]``."""
        self.arrays[layer] = select()(scatter_slots, self.arrays[layer], index, x)

    def copy(self, source: Array, target: Array) -> None:
        """Copy tokens from slots to others, in all layers."""
        for layer in range(len(self.arrays)):
            self.write(layer, target, self.read(layer, source))


def slots_of(table: Sequence[int], block_size: int, start: int, stop: int) -> HostArray:
    """Slots, int32, that hold the tokens from `start` to `stop` of a sequence."""
    token = np.arange(start, stop, dtype=np.int32)
    block, offset = np.divmod(token, np.int32(block_size))
    return np.asarray(table, dtype=np.int32)[block] * np.int32(block_size) + offset


def check_tokens(
    k: Array, v: Array, like: Array, heads: int, key_width: int, value_width: int
) -> None:
    """Check that new tokens can be written to a cache.

    Parameters
    ----------
    k, v : arrays ``[heads, new tokens, width]``
    like : array
        A pool of the cache, whose library, dtype and device they must have.

    Raises
    ------
    NamespaceError, ShapeError, DTypeError
    """
    xp, given = array_namespace(like), array_namespace(k, v)
    if given is not xp:
        raise NamespaceError(
            f"the cache holds arrays of {library_name(xp)}, got {library_name(given)}"
        )
    kind, where = dtype_name(like.dtype), device(like)
    for name, x, width in (("k", k, key_width), ("v", v, value_width)):
        check_array(name, x)
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (heads, width):
            raise ShapeError(
                f"{name} must be [{heads}, new tokens, {width}], got shape {tuple(x.shape)}"
            )
        if dtype_name(x.dtype) != kind:
            raise DTypeError(
                f"{name} must have the cache's dtype {kind}, got {dtype_name(x.dtype)}"
            )
        check_concrete(name, x)
        if device(x) != where:
            raise NamespaceError(f"{name} must be on the cache's device {where}, got {device(x)}")
    if k.shape[1] != v.shape[1]:
        raise ShapeError(
            f"k and v must have the same number of new tokens, got {k.shape[1]} and {v.shape[1]}"
        )


def check_concrete(name: str, x: Array) -> None:
    """Check that no compiler traces `x`.

    Raises
    ------
    NamespaceError
    """
    if not is_concrete(x):
        raise NamespaceError(f"{name} is traced by a compiler; a cache holds real arrays")
