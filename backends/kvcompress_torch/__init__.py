"""PyTorch tensors to the kernels of the other backends, and back, without a copy.

It has a method for every operation; `supports` knows for which calls there are kernels. CPU tensors
go to the kernels for NumPy, CUDA tensors to those for CuPy, on PyTorch's current stream. Importing
this package imports neither PyTorch nor them.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import array_api_compat as compat

from kvcompress.arrays import is_concrete
from kvcompress.backend import KernelBackend
from kvcompress.ops.registry import methods


class TorchBackend(KernelBackend):
    """Takes strided tensors for which another backend has a kernel.

    Not while ``torch.compile`` traces, which compiles the generic operations itself; and not where
    a gradient is asked for, of which kernels know nothing.
    """

    name = "torch"

    def available(self) -> bool:
        """Tell whether PyTorch is installed."""
        return find_spec("torch") is not None

    def usable(self, *arrays: Any) -> bool:
        """Tell whether the arrays are tensors that no compiler traces."""
        return all(compat.is_torch_array(x) and is_concrete(x) for x in arrays)

    def predicate(self, op: str) -> Any:
        """Ask the backend that has the kernel; see `kvcompress.backend.KernelBackend`."""
        from kvcompress_torch.bridge import supports

        return partial(supports, op)

    def __getattr__(self, op: str) -> Any:
        if op not in methods():
            raise AttributeError(f"{type(self).__name__} has no operation {op!r}")
        from kvcompress_torch.bridge import run

        return partial(run, op)


backend = TorchBackend()
