"""``python -m kvcompress.testing.gpu``: builds, checks and times the kernels on the GPU at hand.

Prints one table. Exits with 0 if all results are right, 1 if one is not, 2 if there is no GPU.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from kvcompress import ops
from kvcompress._namespace import (
    FLOATING,
    Array,
    array_namespace,
    astype,
    dtype_name,
    dtype_of,
    namespace_of,
)
from kvcompress.backend import Backend, load
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.packing import packed_size
from kvcompress.ops.rotated import RotatedSpec
from kvcompress.testing import conformance

SHAPE = (64, 8192, 128)
"""Heads, tokens and channels of what is timed: 64 Mi values."""

AXES: tuple[Literal["channel", "token"], ...] = ("channel", "token")
BITS = (2, 3, 4, 8)
GROUP = 64
VECTOR = 4
_HEADS, _BLOCK = 8, 16
BEYOND = 2**31 + 2**20
"""Values of the one tensor that 32 bits cannot number."""


_LINE = "{:23}{:14}{:10}{:>5}{:>10}{:>8}{:>9}{:>11}"

# Relative errors that one rounding more or less leads to.
_ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}


class Device(Protocol):
    """Where the kernels run, and its clock."""

    def describe(self) -> str:
        """Device, library and versions."""

    def array(self, x: np.ndarray[Any, Any]) -> Array:
        """Copy an array from the host."""

    def time(self, function: Callable[[], Any], *, capture: bool) -> float:
        """Seconds of a call; of one that can be captured in a graph, without its launch."""

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second where nothing but copying is done."""

    def has_room(self, size: int) -> bool:
        """Tell whether `size` more bytes can be allocated."""


@dataclass(frozen=True)
class Call:
    """One call that is checked and timed.

    Attributes
    ----------
    op : str
    setting, dtype, bits : str
        Columns of the table.
    arrays : tuple of arrays
    static : dict
        Keywords of the generic operation.
    dtype_out : str or None
        What the kernel narrows its result to, if it does.
    """

    op: str
    setting: str
    dtype: str
    bits: str
    arrays: tuple[Array, ...]
    static: dict[str, Any]
    dtype_out: str | None = None

    @property
    def overwrites(self) -> bool:
        """Whether the first array is changed."""
        return self.op == "scatter_slots"

    def kernel(self, backend: Backend) -> tuple[Array, ...]:
        """Call the backend."""
        static = self.static if self.dtype_out is None else {**self.static, "dtype": self.dtype_out}
        return _tuple(getattr(backend, self.op)(*self.arrays, **static))

    def generic(self) -> tuple[Array, ...]:
        """Call the generic operation."""
        result = _tuple(conformance.generic(self.op)(*self.arrays, **self.static))
        return result if self.dtype_out is None else (astype(result[0], self.dtype_out),)


def run(device: Device, backend: Backend, shape: tuple[int, int, int] = SHAPE) -> int:
    """Check and time all calls; print the table.

    Returns
    -------
    int
        How many checks failed.
    """
    failed = []

    def check(name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # of whatever kind, the others are still worth running
            failed.append(name)
            _say(f"FAILED {name}: {_one_line(error)}")
            return None

    def table() -> None:
        for call in calls(device, shape):
            name = f"{call.op} {call.setting} {call.dtype} {call.bits}"
            line = check(name, partial(_row, call, device, backend, copy))
            if line is not None:
                _say(line)

    started = time.perf_counter()
    _say(f"{device.describe()}, {date.today()}")
    taken = {
        op: check(f"conformance of {op}", partial(_conforms, cases, device, backend))
        for op, cases in _cases().items()
    }
    built = time.perf_counter() - started
    counts = ", ".join(f"{op} {count}" for op, count in sorted(taken.items()) if count)
    _say(f"built and conforming in {built:.0f} s: {counts}")
    copy = check("copy", device.copy_bandwidth) or math.nan
    _say(f"copy: {copy / 1e9:.0f} GB/s, read + written; {shape} values")
    _say(_LINE.format("op", "setting", "dtype", "bits", "us", "GB/s", "of copy", "x generic"))
    check("what is timed", table)
    check("many values", lambda: _many_values(device, backend))
    _say(f"{len(failed)} checks failed in {time.perf_counter() - started:.0f} s")
    return len(failed)


def calls(device: Device, shape: tuple[int, int, int]) -> Iterator[Call]:
    """All calls, at the size that is timed; one tensor at a time. None needs a kernel's results."""
    channels = shape[-1]
    for dtype in FLOATING:
        x = device.array(_normal(shape, dtype, seed=0))
        for axis in AXES:
            for bits in BITS:
                spec = AffineSpec(bits, GROUP, axis)
                yield Call("quantize", f"per {axis}", dtype, str(bits), (x,), {"spec": spec})
                encoded = ops.quantize(x, spec=spec)
                static = {"spec": spec, "channels": channels}
                yield Call("dequantize", f"per {axis}", dtype, str(bits), encoded, static, dtype)
            static = {"spec": AffineSpec(2, GROUP, axis)}
            yield Call("clip_groups", f"per {axis}", dtype, "2", (x,), static)
        for bits in BITS:
            rotated = RotatedSpec(bits, 0)
            yield Call("quantize_rotated", "", dtype, str(bits), (x,), {"spec": rotated})
            coded = ops.quantize_rotated(x, spec=rotated)
            static = {"spec": rotated, "channels": channels}
            yield Call("dequantize_rotated", "", dtype, str(bits), coded, static, dtype)
    heads, tokens, _ = shape
    x = device.array(_normal(shape, "float16", seed=0))
    yield Call("within", "", "float16", "", (x,), {"limit": 65504.0})
    # As an engine has them: tokens of a few heads, in blocks of 16 that are in no order.
    held = _HEADS if heads % _HEADS == 0 else heads
    count = heads * tokens // held
    blocks = np.random.default_rng(4).permutation(-(-count // _BLOCK))
    slots = device.array((blocks[:, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1).astype("int32"))
    pool = array_namespace(x).reshape(x, (count, held, channels))
    pool = array_namespace(x).concat([pool, pool[: slots.shape[0] - count]])
    yield Call("gather_slots", f"blocks of {_BLOCK}", "float16", "", (pool, slots), {})
    rows = device.array(_normal((held, slots.shape[0], channels), "float16", seed=6))
    yield Call("scatter_slots", f"blocks of {_BLOCK}", "float16", "", (pool, slots, rows), {})
    del rows
    yield Call("within_paged", "", "float16", "", (pool, slots), {"limit": 65504.0})
    for axis in AXES:
        spec = AffineSpec(4, GROUP, axis)
        yield Call("quantize_paged", f"per {axis}", "float16", "4", (pool, slots), {"spec": spec})
    static = {"spec": RotatedSpec(4, 0)}
    yield Call("quantize_rotated_paged", "", "float16", "4", (pool, slots), static)
    del x, pool, slots
    vectors = device.array(
        _normal((heads * tokens * channels // VECTOR, VECTOR), "float32", seed=1)
    )
    book = vectors[:256]
    rate = str(8 // VECTOR)
    yield Call("nearest", f"256 x {VECTOR}", "float32", rate, (vectors, book), {})
    codes = device.array(_codes(vectors.shape[:1], seed=7).astype("int32"))
    yield Call("lookup", f"256 x {VECTOR}", "float32", rate, (codes, book), {})
    del vectors, codes
    x = device.array(_normal(shape, "float32", seed=2))
    books = [
        device.array(_normal((heads, 256, VECTOR), "float32", seed=i))
        for i in range(channels // VECTOR)
    ]
    yield Call("encode_product", f"256 x {VECTOR}", "float32", rate, (x, *books), {})
    codes = device.array(_codes((heads, tokens, len(books)), seed=8))
    yield Call("decode_product", f"256 x {VECTOR}", "float32", rate, (codes, *books), {})
    del books, codes
    total = 3 * channels
    variances = device.array(_normal((heads, channels), "float32", seed=5) ** 2)
    depths = ops.allocate(variances, total)
    static = {"bits": total}
    yield Call("quantize_allocated", "", "float32", "3", (x, depths), static)
    packed = device.array(_codes((heads, tokens, packed_size(total, 1)), seed=9))
    yield Call("dequantize_allocated", "", "float32", "3", (packed, depths), static)


def _cases() -> dict[str, list[conformance.Case]]:
    """Those of the conformance suite, by operation."""
    cases: dict[str, list[conformance.Case]] = {}
    for case in conformance.cases():
        cases.setdefault(case.op, []).append(case)
    return cases


def _conforms(cases: list[conformance.Case], device: Device, backend: Backend) -> int:
    """Count the cases that the backend took; a wrong one does not keep the others from running."""
    taken, wrong = 0, []
    for case in cases:
        try:
            taken += conformance.check(backend, case, asarray=device.array)
        except Exception as error:
            wrong.append(f"{case}: {_one_line(error)}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(cases)} cases, the first {wrong[0]}")
    if not taken and hasattr(backend, cases[0].op):
        raise AssertionError("the backend took none of the calls")
    return taken


def _row(call: Call, device: Device, backend: Backend, copy: float) -> str:
    if not backend.supports(call.op, *call.arrays, **call.static):
        raise AssertionError("the backend does not take the call")
    got = _results(call, lambda: call.kernel(backend))
    _compare(call, got, _results(call, call.generic))
    read = call.arrays[call.overwrites :]
    size = sum(x.nbytes for x in (*read, *got))
    del got
    seconds = device.time(lambda: call.kernel(backend), capture=True)
    generic = device.time(call.generic, capture=False)
    rate = size / seconds
    figures = f"{seconds * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / copy:.2f}"
    ratio = f"{generic / seconds:.1f}"
    return _LINE.format(call.op, call.setting, call.dtype, call.bits, *figures, ratio)


def _results(call: Call, run: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
    """Results; where an argument is overwritten, it is zero before, and a copy of it after."""
    if not call.overwrites:
        return run()
    call.arrays[0][...] = 0
    (x,) = run()
    return (array_namespace(x).asarray(x, copy=True),)


def _compare(call: Call, got: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    """Compare on the device: bits, but for floats that were decoded and ties of distances."""
    for a, b in zip(got, expected, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{a.dtype}{a.shape} for {b.dtype}{b.shape}")
        xp = array_namespace(a, b)
        if call.op in ("nearest", "encode_product"):
            wrong = float(xp.mean(xp.astype(a != b, xp.float32)))
            limit = 1e-3  # dot products are rounded otherwise
        elif call.op.startswith("dequantize"):
            ulp = _ULP[dtype_name(a.dtype)]
            a, b = astype(a, "float32"), astype(b, "float32")
            wrong = float(xp.max(xp.abs(a - b)))
            limit = ulp * float(xp.max(xp.abs(b)))
        else:
            kind = f"u{a.dtype.itemsize}"
            wrong, limit = float(xp.sum(xp.astype(a.view(kind) != b.view(kind), xp.float32))), 0.0
        if not wrong <= limit:
            raise AssertionError(f"differs from the generic operation: {wrong} > {limit}")


def _many_values(device: Device, backend: Backend) -> None:
    """Compare the end of a tensor that 32 bits cannot number with that of its end alone."""
    n = SHAPE[-1]
    if not device.has_room(8 * BEYOND):
        _say("tensors beyond 2**31 values: not checked, too little memory")
        return
    end = _normal((1, 2**20 // n, n), "float16", seed=3)
    x = array_namespace(device.array(end)).zeros((1, BEYOND // n, n), dtype=np.float16)
    x[:, -end.shape[1] :, :] = device.array(end)
    ops_and_specs: list[tuple[str, AffineSpec | RotatedSpec]] = [
        *(("quantize", AffineSpec(4, GROUP, axis)) for axis in AXES),
        *(("clip_groups", AffineSpec(2, GROUP, axis)) for axis in AXES),
        ("quantize_rotated", RotatedSpec(4, 0)),
    ]
    for op, spec in ops_and_specs:
        call = Call(op, "", "float16", str(spec.bits), (device.array(end),), {"spec": spec})
        whole = _tuple(getattr(backend, op)(x, spec=spec))
        expected = call.generic()
        _compare(
            call,
            tuple(a[:, -b.shape[1] :, :] for a, b in zip(whole, expected, strict=True)),
            expected,
        )
        del whole  # before there is room for the next


def _normal(shape: tuple[int, ...], dtype: str, *, seed: int) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return x.astype(dtype_of(namespace_of(np), dtype), copy=False)


def _codes(shape: tuple[int, ...], *, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype="uint8")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _tuple(result: Any) -> tuple[Array, ...]:
    return result if isinstance(result, tuple) else (result,)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class CudaDevice:
    """The current device of CuPy."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        # One for all: CuPy's pool keeps apart what was allocated on different streams.
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def describe(self) -> str:
        """See `Device`."""
        runtime = self._cupy.cuda.runtime
        name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        versions = f"driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}"
        return f"{name}, {versions}, CuPy {self._cupy.__version__}"

    def array(self, x: np.ndarray[Any, Any]) -> Array:
        """See `Device`."""
        return self._cupy.asarray(x)

    def time(self, function: Callable[[], Any], *, capture: bool) -> float:
        """See `Device`."""
        cuda = self._cupy.cuda
        self._cupy.cuda.Device().synchronize()
        calls = 10 if capture else 1
        with self._stream as stream:
            run: Callable[[], Any] = function
            function()  # what is compiled is, and the pool holds what the next call allocates
            stream.synchronize()
            if capture:
                stream.begin_capture()
                try:
                    for _ in range(calls):
                        function()
                finally:  # or nothing could be timed any more
                    graph = stream.end_capture()
                run = graph.launch
                run()
            seconds = []
            for _ in range(5):
                start, stop = cuda.Event(), cuda.Event()
                start.record()
                run()
                stop.record()
                stop.synchronize()
                seconds.append(cuda.get_elapsed_time(start, stop) / 1e3 / calls)
        return float(statistics.median(seconds))

    def copy_bandwidth(self) -> float:
        """See `Device`."""
        source = self._cupy.zeros(2**28, dtype=np.float32)
        target = self._cupy.empty_like(source)
        seconds = self.time(lambda: self._cupy.copyto(target, source), capture=True)
        return float(2 * source.nbytes / seconds)

    def has_room(self, size: int) -> bool:
        """See `Device`."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return bool(free > size)


def main() -> int:
    """Run on the GPU at hand.

    Returns
    -------
    int
        The exit code.
    """
    try:
        backend = load("cupy")
        available = backend.available()
    except ImportError as error:
        backend, available = None, False
        reason = str(error)
    else:
        reason = "CuPy 14.2 or later, and a GPU that it can use, are needed"
    if backend is None or not available:
        sys.stderr.write(f"no GPU to test: {reason}\n")
        return 2
    return int(run(CudaDevice(), backend) > 0)


if __name__ == "__main__":
    sys.exit(main())
