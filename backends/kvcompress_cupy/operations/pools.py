"""`within`, and tokens in the slots of a pool: `gather_slots` and `scatter_slots`."""

from __future__ import annotations

from typing import Any

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import takes
from kvcompress_cupy.launches import pools
from kvcompress_cupy.launches.layout import CHANNELS
from kvcompress_cupy.operations.base import Kernels, by_heads, in_place
from kvcompress_cupy.sources import CTYPES, WORDS


def _takes_within(x: Array, **_: Any) -> bool:
    return x.ndim >= 2 and dtype_name(x.dtype) in CTYPES and x.shape[-1] <= CHANNELS


def _takes_within_paged(pool: Array, slots: Array, **_: Any) -> bool:
    return in_place(pool, slots) and _takes_within(pool)


def _takes_gather_slots(pool: Array, slots: Array) -> bool:
    _, heads, channels = pool.shape
    return (
        in_place(pool, slots) and pool.dtype.itemsize >= min(WORDS) and heads * channels <= CHANNELS
    )


def _takes_scatter_slots(pool: Array, slots: Array, x: Array) -> bool:
    return _takes_gather_slots(pool, slots) and x.dtype == pool.dtype


class Pools(Kernels):
    """See `kvcompress.ops.bounds` and `kvcompress.ops.slots`."""

    @takes(_takes_within)
    def within(self, x: Array, *, limit: float) -> Array:
        """See `kvcompress.ops.within`."""
        return self._within(x, None, limit)

    @takes(_takes_within_paged)
    def within_paged(self, pool: Array, slots: Array, *, limit: float) -> Array:
        """Tell of what `kvcompress.ops.gather_slots` would gather."""
        return self._within(by_heads(pool), slots, limit)

    def _within(self, x: Array, slots: Array | None, limit: float) -> Array:
        out = self._runtime.true(x)
        if x.size and (slots is None or slots.size):
            x, rows = self._rows(x, slots)
            aligned = rows.aligned(self._runtime.pointer(x), x.dtype.itemsize)
            launch = pools.within(rows, dtype=dtype_name(x.dtype), limit=limit, aligned=aligned)
            self._runtime.launch(launch, x, slots, out)
        return out

    @takes(_takes_gather_slots)
    def gather_slots(self, pool: Array, slots: Array) -> Array:
        """See `kvcompress.ops.gather_slots`."""
        _, heads, channels = pool.shape
        out = self._runtime.empty((heads, slots.shape[0], channels), dtype_name(pool.dtype), pool)
        if out.size:
            pool, held = self._rows(by_heads(pool))
            address = self._runtime.pointer(pool)
            launch = pools.gather_slots(
                held, tokens=slots.shape[0], itemsize=pool.dtype.itemsize, offset=address % 16
            )
            self._runtime.launch(launch, pool, slots, out)
        return out

    @takes(_takes_scatter_slots)
    def scatter_slots(self, pool: Array, slots: Array, x: Array) -> Array:
        """See `kvcompress.ops.scatter_slots`."""
        if x.size:
            x, rows = self._rows(x)
            target, held = self._rows(by_heads(pool))
            offset = (self._runtime.pointer(x) | self._runtime.pointer(target)) % 16
            launch = pools.scatter_slots(held, rows, itemsize=x.dtype.itemsize, offset=offset)
            self._runtime.launch(launch, slots, x, changed=(target,))
        return pool
