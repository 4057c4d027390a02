"""What a backend must do: the same as the generic operations.

In the tests of a backend::

    @pytest.mark.parametrize("case", conformance.cases(), ids=str)
    def test_conforms(case):
        if not conformance.check(my_backend, case, asarray=cupy.asarray):
            pytest.skip("left to the generic operation")

or all at once, ``conformance.check_backend(my_backend, asarray=cupy.asarray)``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, device, dtype_name, to_host
from kvcompress.backend import Backend
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import (
    OPERATIONS,
    Agreement,
    Nearest,
    Operation,
    Rounded,
    SameBits,
    methods,
)
from kvcompress.ops.slots import gather_slots

_SHAPES = ((1, 1, 1), (2, 7, 5), (3, 65, 16), (1, 128, 64), (2, 0, 8), (0, 4, 8))


@dataclass(frozen=True)
class Case:
    """One call of a method that a backend may have.

    Attributes
    ----------
    op : str
        Name of the method: that of an operation or, on the slots of a pool, with ``_paged``.
    arrays : tuple of NumPy arrays
    static : dict
        Keyword arguments.
    """

    op: str
    arrays: tuple[Any, ...]
    static: dict[str, Any]

    @property
    def operation(self) -> Operation:
        """The operation that the method is for."""
        return methods()[self.op]

    @property
    def overwrites(self) -> bool:
        """Whether the first array may be changed."""
        return self.operation.overwrites

    def compare(self, got: tuple[HostArray, ...], expected: tuple[HostArray, ...]) -> None:
        """Raise AssertionError where results differ by more than the operation allows."""
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_equal(a.shape, b.shape)
            _compare(self.operation.agreement, Call(self.arrays, self.static), a, b)

    def __str__(self) -> str:
        arrays = " ".join(f"{a.dtype.name}{list(a.shape)}" for a in self.arrays)
        static = " ".join(f"{value}" for value in self.static.values())
        return f"{self.op}: {arrays} {static}".strip()


def generic(op: str) -> Callable[..., Any]:
    """Return the generic form of a method; with ``_paged``, it first gathers from a pool."""
    operation = methods()[op]
    if op == operation.name:
        return operation.function
    return lambda pool, slots, *others, **static: operation.function(
        gather_slots(pool, slots), *others, **static
    )


def cases() -> Iterator[Case]:
    """Calls that cover dtypes, empty and ragged shapes, ties, constants and extreme values.

    They are the examples of every operation in `kvcompress.ops.OPERATIONS`.
    """
    for op in list(OPERATIONS.values()):
        for shape, dtype in itertools.product(_SHAPES, op.dtypes):
            seed = zlib.crc32(f"{op.name} {shape} {dtype}".encode())
            inputs = Inputs(shape, dtype, seed=seed)
            for call in op.examples(inputs):
                first, *others = arrays = tuple(to_host(a) for a in call.arrays)
                yield Case(op.name, arrays, call.static)
                if op.paged:
                    paged = *inputs.paged(first), *others
                    yield Case(f"{op.name}_paged", paged, call.static)


def check(backend: Backend, case: Case, *, asarray: Callable[[Any], Array] = np.asarray) -> bool:
    """Run one case on a backend and compare it with the generic operation.

    Parameters
    ----------
    backend : Backend
    case : Case
        One of `cases()`.
    asarray : callable
        Copies a NumPy array (bfloat16 as that of ``ml_dtypes``) into the library, on the device,
        that the backend is for. Raises TypeError where the library lacks the dtype.

    Returns
    -------
    bool
        False if the backend leaves this call to others.

    Raises
    ------
    AssertionError
        If a result has another shape, dtype, library, device or value than it should, or an
        argument was changed.
    """
    kernel = getattr(backend, case.op, None)
    if kernel is None:
        return False
    try:
        arrays = [asarray(a.copy()) for a in case.arrays]
    except TypeError:
        return False
    if not backend.supports(case.op, *arrays, **case.static):
        return False
    expected = _tuple(generic(case.op)(*(asarray(a.copy()) for a in case.arrays), **case.static))
    kept = arrays[case.overwrites :]
    before = [to_host(a).copy() for a in kept]
    got = _tuple(kernel(*arrays, **case.static))
    _same([to_host(a) for a in kept], before)
    names = [(array_namespace(a).__name__, device(a), dtype_name(a.dtype)) for a in expected]
    found = [(array_namespace(a).__name__, device(a), dtype_name(a.dtype)) for a in got]
    np.testing.assert_equal(found, names, f"library, device or dtype of the results of {case}")
    case.compare(tuple(to_host(a) for a in got), tuple(to_host(a) for a in expected))
    return True


def check_backend(
    backend: Backend, *, asarray: Callable[[Any], Array] = np.asarray
) -> dict[str, int]:
    """Run all cases.

    Returns
    -------
    dict of str to int
        How many calls of each method the backend took.

    Raises
    ------
    AssertionError
        See `check`; also if the backend took no call at all.
    """
    np.testing.assert_equal(isinstance(backend, Backend), True, f"{backend!r} is no Backend")
    taken: dict[str, int] = {}
    for case in cases():
        if check(backend, case, asarray=asarray):
            taken[case.op] = taken.get(case.op, 0) + 1
    if not taken:
        raise AssertionError(f"backend {backend.name!r} took none of the calls")
    return taken


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_equal(a.shape, b.shape)
        np.testing.assert_array_equal(_bits(a), _bits(b))


def _bits(x: Any) -> Any:
    """Compare as bytes: -0.0 is not 0.0."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _compare(agreement: Agreement, call: Call, a: HostArray, b: HostArray) -> None:
    match agreement:
        case SameBits():
            np.testing.assert_array_equal(_bits(a), _bits(b))
        case Rounded(bound):
            a, b = a.astype("float64"), b.astype("float64")
            # Narrowing may put two close numbers a whole step apart.
            step, smallest = _STEPS[call.static.get("dtype", "float32")]
            narrowed = np.maximum(step * np.maximum(abs(a), abs(b)), smallest)
            np.testing.assert_array_less(abs(a - b) - (bound(call) + narrowed), 2.0**-149)
        case Nearest(excess):
            worse, rounding = excess(call, a)
            np.testing.assert_array_less(worse, rounding)
        case _:
            np.testing.assert_array_equal(a, b)


_STEPS = {"float32": (0.0, 0.0), "float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 2.0**-133)}
