"""``python -m kvcompress.testing.gpu``: builds, checks and times the kernels on the GPU at hand.

Prints one table. Exits with 0 if all results are right, 1 if one is not, 2 if there is no GPU.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any, Protocol

import numpy as np

from kvcompress.arrays import Array, array_namespace, astype, dtype_name
from kvcompress.backend import Backend, load
from kvcompress.ops.affine import AXES, AffineSpec
from kvcompress.ops.inputs import Call
from kvcompress.ops.registry import Nearest, Rounded
from kvcompress.ops.rotated import RotatedSpec
from kvcompress.testing import conformance
from kvcompress.testing.gpu_calls import SHAPE, Timed, as_tuple, calls, normal

BEYOND = 2**31 + 2**20
"""Values of the one tensor that 32 bits cannot number."""

_LINE = "{:23}{:37}{:10}{:>10}{:>8}{:>9}{:>11}"

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
        for call in calls(device.array, shape, backend):
            line = check(str(call), partial(_row, call, device, backend, copy))
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
    _say(_LINE.format("op", "setting", "dtype", "us", "GB/s", "of copy", "x generic"))
    check("what is timed", table)
    check("many values", lambda: _many_values(device, backend))
    _say(f"{len(failed)} checks failed in {time.perf_counter() - started:.0f} s")
    return len(failed)


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


def _row(call: Timed, device: Device, backend: Backend, copy: float) -> str:
    if not backend.supports(call.op, *call.arrays, **call.call.static):
        raise AssertionError("the backend does not take the call")
    got = _results(call, lambda: call.kernel(backend))
    _compare(call, got, _results(call, call.generic))
    read = call.arrays[call.operation.overwrites :]
    size = sum(x.nbytes for x in (*read, *got))
    del got
    seconds = device.time(lambda: call.kernel(backend), capture=True)
    generic = device.time(call.generic, capture=False)
    rate = size / seconds
    figures = f"{seconds * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / copy:.2f}"
    ratio = f"{generic / seconds:.1f}"
    return _LINE.format(call.op, call.call.label, call.dtype, *figures, ratio)


def _results(call: Timed, run: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
    """Results; where an argument is overwritten, it is zero before, and a copy of it after."""
    if not call.operation.overwrites:
        return run()
    call.arrays[0][...] = 0
    (x,) = run()
    return (array_namespace(x).asarray(x, copy=True),)


def _compare(call: Timed, got: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    """Compare on the device: bits, but for floats that were decoded and ties of distances."""
    for a, b in zip(got, expected, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{a.dtype}{a.shape} for {b.dtype}{b.shape}")
        xp = array_namespace(a, b)
        if isinstance(call.operation.agreement, Nearest):
            wrong = float(xp.mean(xp.astype(a != b, xp.float32)))
            limit = 1e-3  # dot products are rounded otherwise
        elif isinstance(call.operation.agreement, Rounded):
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
    end = normal((1, 2**20 // n, n), "float16", seed=3)
    x = array_namespace(device.array(end)).zeros((1, BEYOND // n, n), dtype=np.float16)
    x[:, -end.shape[1] :, :] = device.array(end)
    ops_and_specs: list[tuple[str, AffineSpec | RotatedSpec]] = [
        *(("quantize", AffineSpec(4, 64, axis)) for axis in AXES),
        *(("clip_groups", AffineSpec(2, 64, axis)) for axis in AXES),
        ("quantize_rotated", RotatedSpec(4, 0)),
    ]
    for op, spec in ops_and_specs:
        call = Timed(op, "float16", Call((device.array(end),), {"spec": spec}))
        whole = as_tuple(getattr(backend, op)(x, spec=spec))
        expected = call.generic()
        _compare(
            call,
            tuple(a[:, -b.shape[1] :, :] for a, b in zip(whole, expected, strict=True)),
            expected,
        )
        del whole  # before there is room for the next


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


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
