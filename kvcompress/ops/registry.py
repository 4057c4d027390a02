"""Operations: functions that a backend may take over, and what has to be known of them for that.

A function becomes an operation by the decorator `operation`. Everything else that lists operations
derives from `OPERATIONS`: what `kvcompress.testing.conformance` checks, what ``kvcompress bench``
and ``kvcompress.testing.gpu`` time, what the backend for PyTorch hands on, the table in the docs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from kvcompress.arrays import FLOATING, HostArray
from kvcompress.ops.inputs import Call, Inputs

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class SameBits:
    """Results must agree in every bit."""


@dataclass(frozen=True)
class SameValues:
    """Results must be equal; a zero may have another sign."""


@dataclass(frozen=True)
class Rounded:
    """Results may differ by roundings, which a compiler may leave out.

    Attributes
    ----------
    bound : callable ``call -> array``, float64
        How far two results may be apart in float32, of the shape of the result. What narrowing
        them to another dtype adds is not part of it.
    """

    bound: Callable[[Call], HostArray]


@dataclass(frozen=True)
class Nearest:
    """Results are codes; where two are as good but for rounding, either may be chosen.

    Attributes
    ----------
    excess : callable ``(call, codes) -> (array, array)``, float64
        How much worse than the best each code is, and how much worse rounding can make it.
    """

    excess: Callable[[Call, HostArray], tuple[HostArray, HostArray]]


Agreement: TypeAlias = SameBits | SameValues | Rounded | Nearest


@dataclass(frozen=True)
class Operation:
    """What has to be known of an operation.

    Attributes
    ----------
    function : callable
        The generic form, which the tests of every kernel are against.
    examples : callable ``Inputs -> iterator of Call``
    agreement : Agreement
        How a backend's results are compared with those of the generic form.
    dtypes : tuple of str
        What `Inputs.dtype` may be: the dtypes of the source.
    paged : bool
        Whether a backend may read the first array where it lies in a paged cache, by a method
        ``<name>_paged``, which takes pool and slots in its place.
    overwrites : bool
        Whether the first array may be overwritten.
    """

    function: Callable[..., Any]
    examples: Callable[[Inputs], Iterator[Call]]
    agreement: Agreement
    dtypes: tuple[str, ...]
    paged: bool
    overwrites: bool

    @property
    def name(self) -> str:
        """Name of the function, and of a backend's method."""
        return self.function.__name__

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").partition("\n")[0]

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that a backend may have for it."""
        return (self.name, f"{self.name}_paged") if self.paged else (self.name,)


OPERATIONS: dict[str, Operation] = {}
"""All operations, by name."""


def operation(
    examples: Callable[[Inputs], Iterator[Call]],
    agreement: Agreement | None = None,
    *,
    dtypes: tuple[str, ...] = FLOATING,
    paged: bool = False,
    overwrites: bool = False,
) -> Callable[[Function], Function]:
    """Register a function as an operation; see `Operation` for the parameters.

    Results are compared bit by bit where no other `agreement` is given.
    """

    def register(function: Function) -> Function:
        described = Operation(
            function, examples, agreement or SameBits(), dtypes, paged, overwrites
        )
        OPERATIONS[described.name] = described
        return function

    return register


def methods() -> dict[str, Operation]:
    """All methods that a backend may have, with the operation that each is for."""
    return {method: op for op in OPERATIONS.values() for method in op.methods}
