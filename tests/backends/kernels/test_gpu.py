"""What ``python -m kvcompress.testing.gpu`` does, on the emulator instead of a GPU."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from kvcompress.testing import conformance, gpu

pytestmark = pytest.mark.xdist_group("built")  # in one process: the kernels are built once


class HostDevice:
    def describe(self):
        return "an emulator"

    def array(self, x):
        return x

    def time(self, function, *, capture):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def copy_bandwidth(self):
        return 1e9

    def has_room(self, size):
        return False


@pytest.fixture(autouse=True)
def fewer_cases(monkeypatch):
    every = sorted(conformance.cases(), key=lambda case: case.op)
    by_op = (list(cases) for _, cases in itertools.groupby(every, lambda case: case.op))
    draw = np.random.default_rng(0).permutation
    cases = [cases[i] for cases in by_op for i in draw(len(cases))[:40]]
    monkeypatch.setattr(conformance, "cases", lambda: iter(cases))


def test_all_calls_are_checked_and_timed(backend, capsys):
    assert gpu.run(HostDevice(), backend, (2, 70, 64)) == 0
    lines = capsys.readouterr().out.splitlines()
    calls = [line for line in lines if " float" in line or " bfloat" in line]
    # Groups, twice; rotated; a pool's tokens moved, checked and both ways of coding them; the rest.
    assert len(calls) == 3 * (2 * 8 + 2 + 2 * 4 + 2 + 2 + 8 + 4) + 6
    assert lines[-1].startswith("0 checks failed")


@pytest.mark.parametrize(
    ("op", "lines"),
    [
        ("quantize", 24),
        ("clip_groups", 6),
        ("dequantize_rotated", 12),
        ("encode_product", 1),
        ("gather_slots", 3),
        ("scatter_slots", 3),
        ("quantize_rotated_paged", 12),
    ],
)
def test_a_wrong_kernel_fails(backend, capsys, op, lines):
    right = getattr(backend, op)

    def wrong(*arrays, **static):
        result = right(*arrays, **static)
        first = result[0] if isinstance(result, tuple) else result
        if first.size > 100:
            first.reshape(-1)[:100] += np.ones(1, first.dtype)
        return result

    setattr(backend, op, wrong)
    conformance.cases = lambda: iter(())
    assert gpu.run(HostDevice(), backend, (2, 70, 64)) >= lines
    assert capsys.readouterr().out.count(f"FAILED {op} ") == lines


def test_a_scatter_that_writes_nothing_fails(backend, capsys):
    backend.scatter_slots = lambda pool, *_: pool
    conformance.cases = lambda: iter(())
    assert gpu.run(HostDevice(), backend, (2, 70, 64)) == 3
    assert "FAILED scatter_slots" in capsys.readouterr().out


def test_a_kernel_that_does_not_run_keeps_no_other_from_running(backend, capsys):
    def broken(*_, **__):
        raise RuntimeError("\nno image\nfor the device")

    backend.quantize = broken
    assert gpu.run(HostDevice(), backend, (2, 70, 64)) == 1 + 24
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert all(line.endswith("RuntimeError: no image for the device") for line in failed)
    # Which case it was, and how many there are.
    which = r": \d+ of 40 cases, the first quantize: float\d+\[\d+, \d+, \d+\] AffineSpec\("
    assert re.search(which, failed[0])
    assert sum(line.startswith("dequantize ") for line in lines) == 24
    assert lines[-1].startswith("25 checks failed")


class Clock:
    """What `CudaDevice` uses of CuPy; a call takes the stream a millisecond."""

    def __init__(self):
        self.now, self.captured = 0, None
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(synchronize=lambda: None),
            Stream=self.stream,
            Event=lambda: Event(self),
            get_elapsed_time=lambda start, stop: stop.at - start.at,
        )

    def stream(self, *, non_blocking):
        assert non_blocking  # the default one cannot be captured
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        assert self.captured is None, "a stream that captures cannot be waited for"

    def begin_capture(self):
        assert self.captured is None, "the stream is capturing"
        self.captured = 0

    def end_capture(self):
        count, self.captured = self.captured, None
        return SimpleNamespace(launch=lambda: self.run(count))

    def run(self, count=1):
        if self.captured is None:
            self.now += count
        else:
            self.captured += count


class Event:
    def __init__(self, clock):
        self._clock, self.at = clock, None

    def record(self):
        self.at = self._clock.now

    def synchronize(self):
        self._clock.synchronize()


@pytest.mark.parametrize("capture", [True, False])
def test_the_time_of_a_call(monkeypatch, capture):
    clock = Clock()
    monkeypatch.setitem(sys.modules, "cupy", clock)
    device = gpu.CudaDevice()
    assert device.time(clock.run, capture=capture) == pytest.approx(1e-3)
    assert device.time(lambda: clock.run(3), capture=capture) == pytest.approx(3e-3)


def test_what_cannot_be_captured_keeps_nothing_from_being_timed(monkeypatch):
    clock = Clock()
    monkeypatch.setitem(sys.modules, "cupy", clock)
    device = gpu.CudaDevice()
    with pytest.raises(AssertionError, match="waited for"):
        device.time(clock.synchronize, capture=True)
    assert device.time(clock.run, capture=True) == pytest.approx(1e-3)


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (3, 1), (256, 1)])
def test_the_exit_code(monkeypatch, failed, code):
    available = SimpleNamespace(available=lambda: True)
    monkeypatch.setattr(gpu, "load", lambda _: available)
    monkeypatch.setattr(gpu, "CudaDevice", HostDevice)
    monkeypatch.setattr(gpu, "run", lambda *_: failed)
    assert gpu.main() == code


def test_without_a_gpu(monkeypatch, capsys):
    unavailable = SimpleNamespace(available=lambda: False)
    monkeypatch.setattr(gpu, "load", lambda _: unavailable)
    assert gpu.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "kvcompress.testing.gpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) in {(2, 1), (0, 0), (1, 0)}
