"""What is checked and timed on a GPU: every operation, at settings that are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcompress.arrays import FLOATING, Array, array_namespace, dtype_of, namespace_of
from kvcompress.backend import Backend
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import OPERATIONS, Operation, methods
from kvcompress.testing import conformance

SHAPE = (64, 8192, 128)
"""Heads, tokens and channels of what is timed: 64 Mi values."""

_HEADS, _BLOCK = 8, 16


@dataclass(frozen=True)
class Timed:
    """One call that is checked and timed.

    Attributes
    ----------
    op : str
        Name of the method that a backend may have.
    dtype : str
        Of the source.
    call : Call
    """

    op: str
    dtype: str
    call: Call

    @property
    def operation(self) -> Operation:
        """The operation that the method is for."""
        return methods()[self.op]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arguments."""
        return self.call.arrays

    def kernel(self, backend: Backend) -> tuple[Array, ...]:
        """Call the backend."""
        return as_tuple(getattr(backend, self.op)(*self.arrays, **self.call.static))

    def generic(self) -> tuple[Array, ...]:
        """Call the generic operation."""
        return as_tuple(conformance.generic(self.op)(*self.arrays, **self.call.static))

    def __str__(self) -> str:
        return " ".join(part for part in (self.op, self.call.label, self.dtype) if part)


@dataclass(frozen=True)
class LargeInputs(Inputs):
    """Inputs of which each is drawn once, and pools as an engine has them.

    Parameters
    ----------
    drawn : dict
        What was drawn, by shape and dtype; `Inputs` that share it share their arrays.
    """

    drawn: dict[Any, Array] = field(default_factory=dict, compare=False)

    def tensor(
        self,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
        *,
        extreme: bool = True,
    ) -> Array:
        """See `Inputs.tensor`."""
        key = shape or self.shape, dtype or self.dtype
        if key not in self.drawn:
            self.drawn[key] = self.array(normal(*key, seed=len(self.drawn)))
        return self.drawn[key]

    def paged(self, x: Array) -> tuple[Array, Array]:
        """Tokens of a few heads, in blocks of 16 that are in no order."""
        heads, tokens, channels = x.shape
        held = _HEADS if heads % _HEADS == 0 else heads
        count = heads * tokens // held
        blocks = np.random.default_rng(4).permutation(-(-count // _BLOCK))
        slots = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1).astype("int32")
        pool = array_namespace(x).reshape(x, (count, held, channels))
        # In a copy, which may be written to.
        pool = array_namespace(x).concat([pool, pool[: slots.size - count]])
        return pool, self.array(slots)


def calls(
    array: Callable[[Any], Array], shape: tuple[int, int, int], backend: Backend
) -> Iterator[Timed]:
    """Every call of a method that `backend` has, at the size that is timed.

    None needs a kernel's results. `array` copies an array from the host.
    """
    for dtype in FLOATING:
        drawn: dict[Any, Array] = {}
        for op in list(OPERATIONS.values()):
            if dtype not in op.dtypes or not any(hasattr(backend, name) for name in op.methods):
                continue
            inputs = LargeInputs(shape, dtype, "usual", array, drawn=drawn)
            for call in op.examples(inputs):
                if hasattr(backend, op.name):
                    yield Timed(op.name, dtype, call)
                if op.paged and hasattr(backend, f"{op.name}_paged"):
                    first, *others = call.arrays
                    paged = Call((*inputs.paged(first), *others), call.static, call.label)
                    yield Timed(f"{op.name}_paged", dtype, paged)


def normal(shape: tuple[int, ...], dtype: str, *, seed: int) -> np.ndarray[Any, Any]:
    """Draw on the host."""
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return x.astype(dtype_of(namespace_of(np), dtype), copy=False)


def as_tuple(result: Any) -> tuple[Array, ...]:
    """Results as a tuple, of one as well."""
    return result if isinstance(result, tuple) else (result,)
