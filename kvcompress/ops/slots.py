"""Tokens in the slots of a pool, as a paged cache holds them: copied together, or read in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcompress.arrays import (
    Array,
    array_namespace,
    device,
    dtype_name,
    is_concrete,
    scatter,
)
from kvcompress.errors import DTypeError, ShapeError, SlotError
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import operation


def _gather_examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor()
    yield Call(inputs.paged(x), source=x)


@operation(_gather_examples)
def gather_slots(pool: Array, slots: Array) -> Array:
    """Copy tokens out of a pool.

    Parameters
    ----------
    pool : array ``[slots, heads, channels]``
    slots : array ``[tokens]``, int32
        Where each token is.

    Returns
    -------
    array ``[heads, tokens, channels]``
    """
    xp = array_namespace(pool, slots)
    return xp.permute_dims(xp.take(pool, slots, axis=0), (1, 0, 2))


def _scatter_examples(inputs: Inputs) -> Iterator[Call]:
    pool, slots = inputs.paged(inputs.tensor())
    x = inputs.tensor((pool.shape[1], slots.shape[0], pool.shape[2]))
    yield Call((pool, slots, x), source=x)


@operation(_scatter_examples, overwrites=True)
def scatter_slots(pool: Array, slots: Array, x: Array) -> Array:
    """Copy tokens into a pool; the reverse of `gather_slots`.

    Parameters
    ----------
    pool : array ``[slots, heads, channels]``
        Overwritten where its library can, and not to be used afterwards.
    slots : array ``[tokens]``, int32
        All different.
    x : array ``[heads, tokens, channels]``
        Of the dtype of the pool.

    Returns
    -------
    array ``[slots, heads, channels]``
        The pool with ``pool[slots[t], h] = x[h, t]``.
    """
    xp = array_namespace(pool, slots, x)
    order = xp.argsort(slots)
    rows = xp.take(xp.permute_dims(x, (1, 0, 2)), order, axis=0)
    return scatter(pool, xp.take(slots, order), rows, overwrite=True)


@dataclass(frozen=True, eq=False)
class Paged:
    """Tokens in the slots of a pool, that stand for what `gather_slots` would copy.

    It answers what an array is asked besides its values: shape, dtype, device and library. Its
    values are for operations: `kvcompress.backend.Dispatcher` runs a kernel that reads them where
    they are, or gathers them first.

    Parameters
    ----------
    pool, slots : arrays
        As `gather_slots` takes them. What is written to the pool later is read.

    Raises
    ------
    ShapeError
        If `pool` does not have three dimensions, or `slots` one.
    DTypeError
        If `slots` are not int32.
    SlotError
        If a slot is negative, or not in the pool. Kernels would read memory that is not theirs.
    """

    pool: Array
    slots: Array

    ndim = 3

    def __post_init__(self) -> None:
        xp = array_namespace(self.pool, self.slots)
        if self.pool.ndim != 3 or self.slots.ndim != 1:
            raise ShapeError(
                "pool must be [slots, heads, channels] and slots [tokens], got shapes "
                f"{tuple(self.pool.shape)} and {tuple(self.slots.shape)}"
            )
        if dtype_name(self.slots.dtype) != "int32":
            raise DTypeError(f"slots must be int32, got {dtype_name(self.slots.dtype)}")
        if not self.slots.shape[0] or not is_concrete(self.slots):
            return
        low, high, last = int(xp.min(self.slots)), int(xp.max(self.slots)), self.pool.shape[0] - 1
        if low < 0 or high > last:
            raise SlotError(f"slots must be from 0 to {last}, got {low if low < 0 else high}")

    @classmethod
    def unchecked(cls, pool: Array, slots: Array) -> Paged:
        """Make one whose slots are known to be in the pool: on a GPU, a look at them takes long."""
        paged = object.__new__(cls)
        object.__setattr__(paged, "pool", pool)
        object.__setattr__(paged, "slots", slots)
        return paged

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(heads, tokens, channels)``."""
        _, heads, channels = self.pool.shape
        return heads, self.slots.shape[0], channels

    @property
    def dtype(self) -> Any:
        """That of the pool."""
        return self.pool.dtype

    @property
    def device(self) -> Any:
        """That of the pool."""
        return device(self.pool)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return array_namespace(self.pool)

    def __getitem__(self, key: tuple[slice, slice, slice]) -> Paged:
        """Some of the tokens, ``[:, start:stop, :]``."""
        heads, tokens, channels = key
        if (heads, channels) != (slice(None), slice(None)):
            raise IndexError(f"only tokens can be sliced before they are gathered, got {key}")
        return Paged.unchecked(self.pool, self.slots[tokens])
