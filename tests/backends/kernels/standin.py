"""A stand-in for CuPy 14.2, as strict: arrays of several devices on the host, emulated kernels."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from emulation import Kernels
from kvcompress_cupy import sources
from kvcompress_cupy.launches.layout import Launch

DEVICES = 2


class ndarray(np.ndarray):
    """An array of a device; views are of the same one."""

    def __array_finalize__(self, source):
        self.number, self.pointer = (getattr(source, a, None) for a in ("number", "pointer"))

    @property
    def data(self):
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])

    @property
    def device(self):
        return self.cupy.cuda.Device(self.number)


def make(kernels: Mapping[str, Kernels]) -> SimpleNamespace:
    """A module with what is used of CuPy, for ``sys.modules``.

    What CuPy has besides is not there. `current` is the number of the current device, `streams`
    the current stream of each, `launched` the device and stream of every launch, in turn.
    """
    state = SimpleNamespace(
        current=0, streams=[0] * DEVICES, launched=[], arrays=[], allocator=None
    )

    class Device:
        def __init__(self, device=None):
            self.id = state.current if device is None else int(device)
            self._before = []

        def __int__(self):
            return self.id

        def __eq__(self, other):
            return isinstance(other, Device) and self.id == other.id

        __hash__ = None

        def __enter__(self):
            self._before.append(state.current)
            state.current = self.id

        def __exit__(self, *_):
            state.current = self._before.pop()

        @property
        def compute_capability(self):
            return "80"

    class Stream:
        @classmethod
        def from_external(cls, stream):
            version, pointer = stream.__cuda_stream__()
            assert version == 0
            self = cls.__new__(cls)
            self.ptr, self.number, self._before = pointer, -1, []
            return self

        def __enter__(self):
            number = state.current if self.number == -1 else self.number
            if number != state.current:
                raise RuntimeError("the device of the stream is not the current one")
            self._before.append((number, state.streams[number]))
            state.streams[number] = self.ptr

        def __exit__(self, *_):
            number, pointer = self._before.pop()
            assert number == state.current
            state.streams[number] = pointer

    class ExternalStream(Stream):
        def __init__(self, ptr, device_id=-1):
            warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)
            self.ptr, self.number, self._before = ptr, device_id, []

    class RawModule:
        def __init__(self, *, code, options, name_expressions):
            # Written to a file in the encoding of the locale, and hashed.
            assert isinstance(code, str)
            assert code.isascii()
            assert isinstance(options, tuple)
            assert all(isinstance(option, str) for option in options)
            (self._family,) = (f for f in sources.FAMILIES if sources.source(f) == code)
            self._names = tuple(name_expressions)

        def get_function(self, name):
            assert name in self._names
            return RawKernel(self._family, name)

    class RawKernel:
        def __init__(self, family, name):
            self._family, self._name = family, name

        def __call__(self, grid, block, args, *, shared_mem=0):
            assert (type(grid), len(grid)) == (type(block), len(block)) == (tuple, 1)
            pointers = [x for x in args if isinstance(x, ndarray | np.uint64)]
            scalars = args[len(pointers) :]
            assert not any(isinstance(x, ndarray | np.uint64) for x in scalars)
            arrays = [x if isinstance(x, ndarray) else None for x in pointers]
            passed = [x for x in arrays if x is not None]
            assert {x.number for x in passed} == {state.current}
            there = [x for x in state.arrays if x.number == state.current]
            state.launched.append((state.current, state.streams[state.current]))
            kernels[self._family](
                Launch(self._family, self._name, *grid, *block, shared_mem, scalars),
                *arrays,
                reached=[x for x in there if not any(np.may_share_memory(x, p) for p in passed)],
                seed=len(state.launched),
                writable=len(arrays),
            )

    def asarray(x):
        out = empty(x.shape, x.dtype)
        out[...] = x
        return out

    class UnownedMemory:
        def __init__(self, ptr, size, owner, device_id):
            self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id

    class MemoryPointer:
        def __init__(self, mem, offset):
            assert mem.device_id == state.current
            self.mem, self.ptr = mem, mem.ptr + offset

    @contextmanager
    def using_allocator(allocator):
        state.allocator, before = allocator, state.allocator
        yield
        state.allocator = before

    def pool(size):
        buffer = np.full(size + 512, 0xA5, "uint8")
        start = -buffer.__array_interface__["data"][0] % 512
        pointer = buffer.__array_interface__["data"][0] + start
        return MemoryPointer(UnownedMemory(pointer, size, buffer, state.current), 0)

    def empty(shape, dtype):
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        pointer = (state.allocator or pool)(size)
        buffer = np.frombuffer((ctypes.c_ubyte * size).from_address(pointer.ptr), "uint8")
        out = buffer.view(kind).reshape(shape).view(Array)
        out.number, out.pointer = state.current, pointer
        state.arrays.append(out)
        return out

    def ones(shape, dtype):
        out = empty(shape, dtype)
        out[...] = 1
        return out

    def ascontiguousarray(x):
        return x if x.flags.c_contiguous else asarray(x)

    class Array(ndarray):
        pass

    module = SimpleNamespace(
        __name__="cupy",
        __version__="14.2.0",
        is_available=lambda: True,
        ndarray=Array,
        RawModule=RawModule,
        cuda=SimpleNamespace(
            Device=Device,
            Stream=Stream,
            ExternalStream=ExternalStream,
            MemoryPointer=MemoryPointer,
            UnownedMemory=UnownedMemory,
            using_allocator=using_allocator,
        ),
        state=state,
    )
    for function in (asarray, empty, ones, ascontiguousarray):
        setattr(module, function.__name__, function)
    Array.cupy = module
    return module
