"""Arrays from one library or device to another, and to the host."""

from __future__ import annotations

import sys
from typing import Any

import array_api_compat as compat
import numpy as np

from kvcompress.arrays.namespace import (
    Array,
    Namespace,
    dtype_name,
    dtype_of,
    ml_dtypes_bfloat16,
)


def convert(x: Array, xp: Namespace, device: Any = None) -> Array:
    """Move `x` to the namespace `xp` and `device`, by DLPack where both sides can."""
    source = compat.array_namespace(x)
    if source is not xp:
        x = _import(x, source, xp)
    return x if device is None else compat.to_device(x, device)


def _import(x: Array, source: Namespace, xp: Namespace) -> Array:
    dtype_of(xp, dtype_name(x.dtype))
    if compat.is_numpy_namespace(source):
        x = np.ascontiguousarray(x)  # negative strides abort PyTorch
    try:
        return xp.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        return _from_host(to_host(x), xp)


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """Copy or view `x` as a NumPy array (bfloat16 as that of ml_dtypes)."""
    if compat.is_torch_array(x):
        x = x.detach().cpu()
        if dtype_name(x.dtype) == "bfloat16":
            bits = np.asarray(x.view(sys.modules["torch"].int16))
            return bits.view(ml_dtypes_bfloat16())
    elif compat.is_cupy_array(x):
        x = x.get()
    return np.asarray(x)


def _from_host(x: np.ndarray[Any, Any], xp: Namespace) -> Array:
    if compat.is_torch_namespace(xp):
        x = np.array(x, copy=True)  # torch rejects read-only memory
        if dtype_name(x.dtype) == "bfloat16":
            return xp.asarray(x.view(np.int16)).view(xp.bfloat16)
    return xp.asarray(x)
