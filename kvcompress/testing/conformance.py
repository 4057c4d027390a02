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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from kvcompress import ops
from kvcompress._namespace import (
    FLOATING,
    Array,
    array_namespace,
    device,
    dtype_name,
    dtype_of,
    namespace_of,
    to_host,
)
from kvcompress.backend import Backend
from kvcompress.ops.affine import AffineSpec

_AXES: tuple[Literal["channel", "token"], ...] = ("channel", "token")
_SHAPES = ((1, 1, 1), (2, 7, 5), (3, 65, 16), (1, 128, 64), (2, 0, 8), (0, 4, 8))


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes
    ----------
    op : str
        Name of the operation in `kvcompress.ops`.
    arrays : tuple of NumPy arrays
    static : dict
        Keyword arguments.
    compare : callable ``(case, got, expected)``
        Raises AssertionError where results differ by more than the operation allows; both are
        tuples of NumPy arrays.
    """

    op: str
    arrays: tuple[Any, ...]
    static: dict[str, Any] = field(default_factory=dict)
    compare: Callable[[Case, tuple[Any, ...], tuple[Any, ...]], None] = field(
        default=lambda _, got, expected: _same(got, expected)
    )

    def __str__(self) -> str:
        arrays = " ".join(f"{a.dtype.name}{list(a.shape)}" for a in self.arrays)
        static = " ".join(f"{value}" for value in self.static.values())
        return f"{self.op}: {arrays} {static}".strip()


def cases() -> Iterator[Case]:
    """Calls that cover dtypes, empty and ragged shapes, ties, constants and extreme values."""
    specs = [
        AffineSpec(bits, size, axis)
        for bits, size, axis in itertools.product((1, 2, 3, 4, 8), (16, 64), _AXES)
    ]
    seeds = itertools.count()
    for shape, dtype in itertools.product(_SHAPES, FLOATING):
        for spec in specs:
            x = _tensor(shape, dtype, seed=next(seeds))
            yield Case("quantize", (x,), {"spec": spec})
            encoded = tuple(to_host(a) for a in ops.quantize(x, spec=spec))
            static = {"spec": spec, "channels": shape[-1]}
            yield Case("dequantize", encoded, static, _dequantized)
    for (_, vectors, dim), size in itertools.product(_SHAPES[:-1], (2, 3, 256)):
        x = _tensor((vectors, dim), "float32", seed=next(seeds), extreme=False)
        codebook = _tensor((size, dim), "float32", seed=next(seeds), extreme=False)
        codebook[1] = codebook[0]  # the first of equals is asked for
        yield Case("nearest", (x, codebook), compare=_nearest)
        codes = np.random.default_rng(next(seeds)).integers(0, size, vectors)
        yield Case("lookup", (codes.astype("int32"), codebook))


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
    before = [to_host(a).copy() for a in arrays]
    got = _tuple(kernel(*arrays, **case.static))
    _same([to_host(a) for a in arrays], before)
    expected = _tuple(getattr(ops, case.op)(*arrays, **case.static))
    names = [(array_namespace(a).__name__, device(a), dtype_name(a.dtype)) for a in expected]
    found = [(array_namespace(a).__name__, device(a), dtype_name(a.dtype)) for a in got]
    np.testing.assert_equal(found, names, f"library, device or dtype of the results of {case}")
    case.compare(case, tuple(to_host(a) for a in got), tuple(to_host(a) for a in expected))
    return True


def check_backend(
    backend: Backend, *, asarray: Callable[[Any], Array] = np.asarray
) -> dict[str, int]:
    """Run all cases.

    Returns
    -------
    dict of str to int
        How many calls of each operation the backend took.

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


def _tensor(shape: tuple[int, ...], dtype: str, *, seed: int, extreme: bool = True) -> Any:
    """Values with ties, a constant channel and, if `extreme`, zeros, denormals and large ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    x[..., ::3] = np.round(2 * x[..., ::3]) / 2
    x[..., -1:] = 0.75
    x[..., 1:2] *= 0  # zeros of both signs
    if extreme and x.size:
        large = 65504.0 if dtype == "float16" else 2.0**126
        special = [0.0, -0.0, 2.0**-24, -(2.0**-130), large, -large]
        where = rng.integers(0, x.size, len(special))
        x.reshape(-1)[where] = special
    return x.astype(dtype_of(namespace_of(np), dtype))


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_equal(a.shape, b.shape)
        np.testing.assert_array_equal(_bits(a), _bits(b))


def _bits(x: Any) -> Any:
    """Compare as bytes: -0.0 is not 0.0."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _dequantized(case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    # Four roundings relative to the extent and one to the sum, on either side; a fused
    # multiply-add only leaves some out.
    spec, (a,), (b,) = case.static["spec"], got, expected
    lower, upper = (end.astype("float64") for end in case.arrays[1:])
    unit = 2.0**-24
    bound = 2 * unit * (5 * (upper - lower) + np.maximum(abs(lower), abs(upper))) + 2.0**-126
    axis = -2 if spec.axis == "channel" else -1
    bound = np.repeat(bound, spec.group_size, axis=axis)[..., : b.shape[-2], : b.shape[-1]]
    np.testing.assert_equal(a.shape, b.shape)
    excess = abs(a.astype("float64") - b.astype("float64")) - bound
    np.testing.assert_array_less(excess, 2.0**-149)


def _nearest(case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    # Both minimize |c|^2 / 2 - x.c in float32, each within gamma(dim + 2) of the sum of magnitudes.
    x, codebook = (a.astype("float64") for a in case.arrays)
    (a,), (b,) = got, expected
    np.testing.assert_equal(a.shape, b.shape)
    np.testing.assert_equal(bool(np.any(a == 1)), False, "code 1 equals code 0, the first")
    unit = (x.shape[-1] + 2) * 2.0**-24
    size = abs(x) @ abs(codebook).T + (codebook**2).sum(-1) / 2
    score = (codebook**2).sum(-1) / 2 - x @ codebook.T
    if x.size:
        worse = score[np.arange(len(x)), a] - score.min(-1)
        np.testing.assert_array_less(worse, 2 * unit * size.max(-1) + 2.0**-126)
