"""Tensors as arrays of NumPy or CuPy that share their memory, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from kvcompress.arrays import dtype_of, namespace_of
from kvcompress.backend import BUILTIN, Backend
from kvcompress.errors import BackendWarning, DTypeError

KERNELS = {"cpu": "numba", "cuda": "cupy"}
"""Backend for the tensors of a kind of device."""


def supports(op: str, *tensors: Any, **static: Any) -> bool:
    """Tell whether there is a kernel, and no reason to leave the tensors alone."""
    device = tensors[0].device
    kernels = _kernels(device.type)
    if kernels is None or not hasattr(kernels, op):
        return False
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if gradient or any(x.device != device or x.layout != torch.strided for x in tensors):
        return False
    try:
        with _stream(device):
            return kernels.supports(op, *map(_view, tensors), **static)
    except (BufferError, DTypeError, RuntimeError, TypeError):
        return False  # tensors that are not what lies in memory, such as functorch's


def run(op: str, *tensors: Any, **static: Any) -> Any:
    """Run the kernel that `supports` found."""
    device = tensors[0].device
    with _stream(device):
        result = getattr(_kernels(device.type), op)(*map(_view, tensors), **static)
        if isinstance(result, tuple):
            return tuple(_tensor(x, device) for x in result)
        return _tensor(result, device)


@cache
def _kernels(kind: str) -> Backend | None:
    module = BUILTIN.get(KERNELS.get(kind, ""))
    if module is None or find_spec(module) is None:
        return None
    try:
        backend: Backend = import_module(module).backend
        return backend if backend.available() else None
    except Exception as error:
        warnings.warn(
            f"PyTorch does without the backend {KERNELS[kind]!r}, which failed to load: {error}",
            BackendWarning,
            stacklevel=4,
        )
        return None


def _stream(device: torch.device) -> AbstractContextManager[None]:
    """Make PyTorch's current stream and memory CuPy's."""
    return _cuda_stream(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _cuda_stream(device: torch.device) -> Iterator[None]:
    import cupy

    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    memory = cupy.cuda.using_allocator(partial(_allocate, device))
    with cupy.cuda.Device(device.index), stream, memory:  # a stream on its own device only
        yield


def _allocate(device: torch.device, size: int) -> Any:
    """Memory of PyTorch's pool, of which CUDA graphs keep what they captured, unlike CuPy's."""
    import cupy

    block = torch.empty(size, dtype=torch.uint8, device=device)
    memory = cupy.cuda.UnownedMemory(block.data_ptr(), size, block, device.index)
    return cupy.cuda.MemoryPointer(memory, 0)


def _view(x: torch.Tensor) -> Any:
    """View a tensor as an array; bfloat16 crosses as int16."""
    # NumPy refuses these; DLPack hands out memory that is none, or without the sign.
    if x.is_neg() or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError("only what a tensor shows can be viewed, and this one is computed lazily")
    half = x.dtype is torch.bfloat16
    x = x.detach()
    if half:
        x = x.view(torch.int16)
    if x.device.type == "cpu":
        array = x.numpy()
    else:
        import cupy

        array = cupy.from_dlpack(x)
    return array.view(_bfloat16()) if half else array


def _tensor(x: Any, device: torch.device) -> torch.Tensor:
    half = x.dtype.name == "bfloat16"
    if half:
        x = x.view(np.int16)
    tensor = torch.from_numpy(np.asarray(x)) if device.type == "cpu" else torch.from_dlpack(x)
    return tensor.view(torch.bfloat16) if half else tensor


@cache
def _bfloat16() -> Any:
    return np.dtype(dtype_of(namespace_of(np), "bfloat16"))
