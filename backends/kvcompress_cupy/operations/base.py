"""What all operations share: where arrays live, and how a kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from kvcompress.arrays import Array
from kvcompress.backend import KernelBackend
from kvcompress_cupy.launches import layout
from kvcompress_cupy.launches.layout import Launch, Rows


class Runtime(Protocol):
    """Where arrays live and kernels run."""

    def pointer(self, x: Array) -> int:
        """Address of the first element of `x`."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Array:
        """Allocate an array on the device of `like`."""

    def true(self, like: Array) -> Array:
        """Allocate a boolean without dimensions, and set it."""

    def contiguous(self, x: Array) -> Array:
        """Return `x` or a copy in C order."""

    def launch(
        self,
        launch: Launch,
        *arrays: Array | None,
        reached: Sequence[Array] = (),
        changed: Sequence[Array] = (),
    ) -> None:
        """Run a kernel on the current stream; it reaches some arrays through its scalars.

        None is a null pointer. What comes from the caller and is `changed` is passed last.
        """


class Kernels(KernelBackend):
    """Kernels behind the signatures of `kvcompress.ops`.

    Parameters
    ----------
    runtime : Runtime
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def _contiguous(self, x: Array) -> Array:
        return x if x.flags.c_contiguous else self._runtime.contiguous(x)

    def _rows(self, x: Array, slots: Array | None = None) -> tuple[Array, Rows]:
        """Rows of `x`, or of a copy where its strides are of no use; those in `slots`, if given."""
        rows = layout.rows(x.shape, x.strides, x.dtype.itemsize)
        if rows is None:
            x, rows = self._runtime.contiguous(x), layout.contiguous_rows(x.shape)
        if slots is not None:
            rows = replace(rows, tokens=slots.shape[0], paged=True)
        return x, rows


def in_place(pool: Array, slots: Array) -> bool:
    """Tell whether kernels can use a pool as it lies."""
    return (
        pool.ndim == 3
        and slots.dtype.name == "int32"
        and bool(slots.flags.c_contiguous)
        and layout.rows(by_heads(pool).shape, by_heads(pool).strides, pool.dtype.itemsize)
        is not None
    )


def by_heads(pool: Array) -> Array:
    """View a pool as ``[heads, slots, channels]``."""
    return pool.transpose(1, 0, 2)
