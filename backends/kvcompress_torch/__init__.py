"""PyTorch tensors to the kernels of the other backends, and back, without a copy.

CPU tensors go to the kernels for NumPy, CUDA tensors to those for CuPy, on PyTorch's current
stream. Importing this package imports neither PyTorch nor them.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import array_api_compat as compat

from kvcompress.arrays import is_concrete

OPERATIONS = frozenset(
    {
        "cast",
        "clip_groups",
        "decode_product",
        "dequantize",
        "dequantize_allocated",
        "dequantize_rotated",
        "encode_product",
        "gather_slots",
        "lookup",
        "nearest",
        "quantize",
        "quantize_allocated",
        "quantize_paged",
        "quantize_rotated",
        "quantize_rotated_paged",
        "scatter_slots",
        "within",
        "within_paged",
    }
)
"""What kernels there may be; `supports` knows which there are."""


class TorchBackend:
    """Takes strided tensors for which another backend has a kernel.

    Not while ``torch.compile`` traces, which compiles the generic operations itself; and not where
    a gradient is asked for, of which kernels know nothing.
    """

    name = "torch"

    def available(self) -> bool:
        """Tell whether PyTorch is installed."""
        return find_spec("torch") is not None

    def supports(self, op: str, *arrays: Any, **static: Any) -> bool:
        """See `kvcompress.backend.Backend`."""
        if not all(compat.is_torch_array(x) and is_concrete(x) for x in arrays):
            return False
        from kvcompress_torch.bridge import supports

        return supports(op, arrays, static)

    def __getattr__(self, op: str) -> Any:
        if op not in OPERATIONS:
            raise AttributeError(f"{type(self).__name__} has no operation {op!r}")
        from kvcompress_torch.bridge import run

        return partial(run, op)


backend = TorchBackend()
