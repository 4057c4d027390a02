"""What ``python -m kvcompress.testing.gpu`` does, on the emulator instead of a GPU."""

from __future__ import annotations

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
    cases = list(conformance.cases())[::20]
    monkeypatch.setattr(conformance, "cases", lambda: iter(cases))


def test_all_calls_are_checked_and_timed(backend, capsys):
    assert gpu.run(HostDevice(), backend, (2, 70, 64)) == 0
    lines = capsys.readouterr().out.splitlines()
    calls = [line for line in lines if " float" in line or " bfloat" in line]
    assert len(calls) == 3 * (4 * (4 + 2) + 2) + 7 + 6
    assert lines[-1].startswith("0 checks failed")


@pytest.mark.parametrize(
    ("op", "lines"),
    [
        ("quantize", 24),
        ("clip_groups", 6),
        ("dequantize_rotated", 12),
        ("encode_product", 1),
        ("gather_slots", 1),
        ("scatter_slots", 1),
        ("quantize_rotated_paged", 1),
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
    assert gpu.run(HostDevice(), backend, (2, 70, 64)) == 1
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
    assert " cases, the first quantize: float16[1, 1, 1] AffineSpec(" in failed[0]
    assert sum(line.startswith("dequantize ") for line in lines) == 24
    assert lines[-1].startswith("25 checks failed")


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
