"""The backend for CuPy, on a stand-in for it that is as strict."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import standin
from kvcompress_cupy.backend import CupyBackend, _has_bfloat16, _kernel, _module

from kvcompress import ops
from kvcompress.ops.affine import AffineSpec
from kvcompress.testing import conformance

pytestmark = pytest.mark.xdist_group("built")  # in one process: the kernels are built once


@pytest.fixture
def cupy(kernels, monkeypatch):
    cupy = standin.make(kernels)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    caches = _kernel, _module, _has_bfloat16
    for cached in caches:
        cached.cache_clear()
    yield cupy
    for cached in caches:
        cached.cache_clear()


def copies(cupy, device, *arrays):
    with cupy.cuda.Device(device):
        return [cupy.asarray(x.copy()) for x in arrays]


def test_conforms_on_a_device_that_is_not_the_current_one(cupy):
    backend, taken = CupyBackend(), set()
    assert backend.available()
    turn = Counter()
    for case in conformance.cases():
        turn[case.op] += 1
        if turn[case.op] % 7 != 3:
            continue
        arrays = copies(cupy, 1, *case.arrays)
        if not hasattr(backend, case.op) or not backend.supports(case.op, *arrays, **case.static):
            continue
        taken.add(case.op)
        got = getattr(backend, case.op)(*arrays, **case.static)
        got = got if isinstance(got, tuple) else (got,)
        assert {(type(x), x.device.id) for x in got} == {(cupy.ndarray, 1)}
        expected = conformance.generic(case.op)(*(x.copy() for x in case.arrays), **case.static)
        expected = expected if isinstance(expected, tuple) else (expected,)
        case.compare(tuple(map(np.array, got)), tuple(map(np.array, expected)))
        cupy.state.arrays.clear()
    assert taken >= {"quantize", "dequantize", "encode_product", "scatter_slots", "within"}
    assert cupy.state.current == 0
    assert set(cupy.state.launched) == {(1, 0)}


def test_what_has_to_be_copied_is_copied_on_its_device(cupy):
    x = np.random.default_rng(0).standard_normal((2, 64, 70)).astype("float32")
    spec = AffineSpec(4, 64, "token")
    (y,) = copies(cupy, 1, x)
    got = CupyBackend().quantize(np.swapaxes(y, 1, 2), spec=spec)
    for a, b in zip(got, ops.quantize(np.swapaxes(x, 1, 2), spec=spec), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_of_several_devices_are_left_alone(cupy):
    backend = CupyBackend()
    x, book = np.zeros((9, 4), "float32"), np.zeros((3, 4), "float32")
    assert backend.supports("nearest", *copies(cupy, 1, x, book))
    mixed = *copies(cupy, 0, x), *copies(cupy, 1, book)
    assert not backend.supports("nearest", *mixed)
    assert not backend.supports("nearest", x, book)


@pytest.fixture
def bridge(monkeypatch):
    torch = pytest.importorskip("torch")
    from kvcompress_torch import bridge

    stream, empty = SimpleNamespace(__cuda_stream__=lambda: (0, 77)), torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, **_: empty(size, dtype=dtype))
    return bridge


def test_pytorch_s_stream_and_device_are_taken(cupy, bridge):
    with bridge._stream(bridge.torch.device("cuda", 1)):
        assert (cupy.state.current, cupy.state.streams) == (1, [0, 77])
    assert (cupy.state.current, cupy.state.streams) == (0, [0, 0])


def test_results_are_pytorch_s_memory(cupy, bridge):
    x = np.random.default_rng(0).standard_normal((2, 64, 64)).astype("float32")
    (y,) = copies(cupy, 1, x)
    spec = AffineSpec(4, 64, "token")
    with bridge._stream(bridge.torch.device("cuda", 1)):
        got = CupyBackend().quantize(y, spec=spec)
    for a, b in zip(got, ops.quantize(x, spec=spec), strict=True):
        owner = a.pointer.mem.owner
        assert isinstance(owner, bridge.torch.Tensor)
        assert (owner.data_ptr(), owner.numel()) == (a.data.ptr, a.nbytes)
        np.testing.assert_array_equal(a, b)
    assert cupy.state.launched == [(1, 77)]
    assert cupy.state.allocator is None
