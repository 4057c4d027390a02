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
from kvcompress.arrays import (
    FLOAT16_MAX,
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
from kvcompress.ops.lloyd_max import levels
from kvcompress.ops.rotated import RotatedSpec

_AXES: tuple[Literal["channel", "token"], ...] = ("channel", "token")
_SHAPES = ((1, 1, 1), (2, 7, 5), (3, 65, 16), (1, 128, 64), (2, 0, 8), (0, 4, 8))


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes
    ----------
    op : str
        Name of the operation in `kvcompress.ops`; with ``_paged``, on the slots of a pool.
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

    @property
    def overwrites(self) -> bool:
        """Whether the first array may be changed."""
        return self.op == "scatter_slots"

    def __str__(self) -> str:
        arrays = " ".join(f"{a.dtype.name}{list(a.shape)}" for a in self.arrays)
        static = " ".join(f"{value}" for value in self.static.values())
        return f"{self.op}: {arrays} {static}".strip()


def generic(op: str) -> Callable[..., Any]:
    """Return the operation called `op`; with ``_paged``, one that first gathers from a pool."""
    plain: Callable[..., Any] = getattr(ops, op.removesuffix("_paged"))
    if not op.endswith("_paged"):
        return plain
    return lambda pool, slots, **static: plain(ops.gather_slots(pool, slots), **static)


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
            if spec.bits == 4:
                for narrow in FLOATING[:2]:
                    yield Case("dequantize", encoded, {**static, "dtype": narrow}, _dequantized)
            if spec.bits < 4:
                yield Case("clip_groups", (x,), {"spec": spec}, _equal)
        x = _tensor(shape, dtype, seed=next(seeds))
        for other in FLOATING:
            yield Case("cast", (x,), {"dtype": other})
        for limit in (0.5, 2.0**100 if dtype != "float16" else FLOAT16_MAX):
            yield Case("within", (x,), {"limit": limit}, _equal)
        for bits, seed in itertools.product(range(1, 9), (0, 7)):
            rotated = RotatedSpec(bits, seed)
            if shape[-1] & (shape[-1] - 1) == 0:  # or libraries need not agree
                yield Case("quantize_rotated", (x,), {"spec": rotated})
            encoded = tuple(to_host(a) for a in ops.quantize_rotated(x, spec=rotated))
            static = {"spec": rotated, "channels": shape[-1], "dtype": dtype}
            yield Case("dequantize_rotated", encoded, static, _derotated)
    for (heads, tokens, channels), dtype in itertools.product(_SHAPES, FLOATING):
        pool = _tensor((tokens + 3, heads, channels), dtype, seed=next(seeds))
        rng = np.random.default_rng(next(seeds))
        paged = pool, rng.permutation(tokens + 3)[:tokens].astype("int32")
        yield Case("gather_slots", paged)
        x = _tensor((heads, tokens, channels), dtype, seed=next(seeds))
        yield Case("scatter_slots", (*paged, x))
        yield Case("within_paged", paged, {"limit": 0.75}, _equal)
        for bits, axis in itertools.product((2, 4), _AXES):
            yield Case("quantize_paged", paged, {"spec": AffineSpec(bits, 64, axis)})
        if channels & (channels - 1) == 0:
            yield Case("quantize_rotated_paged", paged, {"spec": RotatedSpec(4, 0)})
    x = 2.0**-99 * (1 + np.random.default_rng(next(seeds)).integers(0, 9, (2, 40, 16)) * 2.0**-23)
    for axis in _AXES:  # ranges that count as none, between extremes that count
        yield Case("quantize", (x.astype("float32"),), {"spec": AffineSpec(4, 16, axis)})
    for range_dtype, axis in itertools.product(FLOATING[:2], _AXES):
        # So far from zero that minimum and maximum, rounded, leave values outside.
        x = _tensor((3, 65, 16), "float32", seed=next(seeds), extreme=False) / 16 + 300
        yield Case("quantize", (x,), {"spec": AffineSpec(4, 16, axis, range_dtype)})
    for (_, vectors, dim), size in itertools.product(_SHAPES[:-1], (2, 3, 256)):
        x = _tensor((vectors, dim), "float32", seed=next(seeds), extreme=False)
        codebook = _tensor((size, dim), "float32", seed=next(seeds), extreme=False)
        codebook[1] = codebook[0]  # the first of equals is asked for
        yield Case("nearest", (x, codebook), compare=_nearest)
        codes = np.random.default_rng(next(seeds)).integers(0, size, vectors)
        yield Case("lookup", (codes.astype("int32"), codebook))
    for heads, tokens, channels in _SHAPES:
        widths = [*([1] if channels % 4 else []), *[4] * (channels // 4)]
        x = _tensor((heads, tokens, sum(widths)), "float32", seed=next(seeds), extreme=False)
        books = tuple(
            _tensor((heads, 256, dim), "float32", seed=next(seeds), extreme=False) for dim in widths
        )
        for book in books:
            book[:, 1] = book[:, 0]
        yield Case("encode_product", (x, *books), compare=_product)
        draw = np.random.default_rng(next(seeds)).integers
        codes = draw(0, 256, (heads, tokens, len(widths)), dtype="uint8")
        yield Case("decode_product", (codes, *books))
    for shape in _SHAPES:
        heads, _, channels = shape
        x = _tensor(shape, "float32", seed=next(seeds))
        for bits in (1, 2 * channels + 1, 8 * channels):
            variances = np.random.default_rng(next(seeds)).random((heads, channels), "float32")
            component_bits = to_host(ops.allocate(variances, bits))
            yield Case("quantize_allocated", (x, component_bits), {"bits": bits})
            packed = to_host(ops.quantize_allocated(x, component_bits, bits=bits))
            yield Case("dequantize_allocated", (packed, component_bits), {"bits": bits}, _equal)


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
        large = FLOAT16_MAX if dtype == "float16" else 2.0**126
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


def _equal(_: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_equal(a.shape, b.shape)
        np.testing.assert_array_equal(a, b)


def _dequantized(case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    # Four roundings relative to the extent and one to the sum, on either side; a fused
    # multiply-add only leaves some out.
    spec, (a,), (b,) = case.static["spec"], got, expected
    minimum, maximum = (a.astype("float64") for a in case.arrays[1:])
    unit = 2.0**-24
    bound = (
        2 * unit * (5 * (maximum - minimum) + np.maximum(abs(minimum), abs(maximum))) + 2.0**-126
    )
    axis = -2 if spec.axis == "channel" else -1
    bound = np.repeat(bound, spec.group_size, axis=axis)[..., : b.shape[-2], : b.shape[-1]]
    _close(case, a, b, bound)


def _derotated(case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    # Every output is a sum of all levels with weights of at most sqrt(2 / n), times the gain: one
    # rounding for each round of the fast part, one for each term of the odd part, and four more.
    spec, (a,), (b,) = case.static["spec"], got, expected
    n = case.static["channels"]
    power = n & -n
    roundings = n // power + power.bit_length() + 3
    level = float(levels(spec.bits)[-1])
    gain = case.arrays[1].astype("float64")
    bound = 2 * roundings * 2.0**-24 * gain * n * level * (2 / n) ** 0.5 + 2.0**-126
    _close(case, a, b, np.broadcast_to(bound, b.shape))


def _close(case: Case, a: Any, b: Any, bound: Any) -> None:
    """Compare float32 numbers known to `bound`, or what they were narrowed to."""
    np.testing.assert_equal(a.shape, b.shape)
    a, b = a.astype("float64"), b.astype("float64")
    # Narrowing may put two close numbers a whole step apart.
    step, smallest = _STEPS[case.static.get("dtype", "float32")]
    bound = bound + np.maximum(step * np.maximum(abs(a), abs(b)), smallest)
    np.testing.assert_array_less(abs(a - b) - bound, 2.0**-149)


_STEPS = {"float32": (0.0, 0.0), "float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 2.0**-133)}


def _nearest(case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    np.testing.assert_equal(got[0].shape, expected[0].shape)
    x, codebook = case.arrays
    _best(x, codebook, got[0])


def _product(case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    np.testing.assert_equal(got[0].shape, expected[0].shape)
    x, *books = case.arrays
    for head in range(x.shape[0]):
        at = 0
        for i, book in enumerate(books):
            dim = book.shape[-1]
            _best(x[head, :, at : at + dim], book[head], got[0][head, :, i])
            at += dim


def _best(x: Any, codebook: Any, codes: Any) -> None:
    # Both minimize |c|^2 / 2 - x.c in float32, each within gamma(dim + 2) of the sum of magnitudes.
    x, codebook = x.astype("float64"), codebook.astype("float64")
    np.testing.assert_equal(bool(np.any(codes == 1)), False, "code 1 equals code 0, the first")
    unit = (x.shape[-1] + 2) * 2.0**-24
    size = abs(x) @ abs(codebook).T + (codebook**2).sum(-1) / 2
    score = (codebook**2).sum(-1) / 2 - x @ codebook.T
    if x.size:
        worse = score[np.arange(len(x)), codes] - score.min(-1)
        np.testing.assert_array_less(worse, 2 * unit * size.max(-1) + 2.0**-126)
