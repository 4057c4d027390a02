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
