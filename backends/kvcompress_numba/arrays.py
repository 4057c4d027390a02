"""How kernels see arrays: flat, with strides, in dtypes that Numba has."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from kvcompress.arrays import dtype_name, dtype_of, namespace_of
from kvcompress_numba.threads import inline

NDArray = np.ndarray[Any, Any]

_NUMPY = namespace_of(np)

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("uint16"),
    "bfloat16": np.dtype("int16"),
    "uint8": np.dtype("uint8"),
}


Rows: TypeAlias = tuple[NDArray, int, int]
"""Rows of an array ``[..., tokens, n]`` where they lie: flat, and strides of heads and of tokens.

Row ``t`` of head ``h`` begins at ``flat[h * head + t * token]`` and is contiguous. A plain tuple:
Numba takes longer to look at one with names.
"""


def rows(x: NDArray) -> Rows:
    """View `x`, to be read; a copy only where rows are not contiguous."""
    x = x.view(STORAGE[dtype_name(x.dtype)]).reshape(fold(x.shape))
    heads, tokens, n = x.shape
    if not x.flags.c_contiguous:
        size = x.itemsize
        head, token, step = x.strides
        if step == size and head >= 0 and token >= 0 and x.size:
            extent = (head * (heads - 1) + token * (tokens - 1)) // size + n
            flat = np.lib.stride_tricks.as_strided(x, (extent,), (size,), writeable=False)
            return flat, head // size, token // size
        x = np.ascontiguousarray(x)
    flat = x.reshape(-1).view()
    # Always so, or Numba would compile every kernel for either kind.
    flat.flags.writeable = False
    return flat, tokens * n, n


def empty(shape: tuple[int, ...], dtype: str) -> tuple[NDArray, NDArray]:
    """Return a new array, and a flat view of it for kernels to write."""
    x = np.empty(shape, dtype=dtype_of(_NUMPY, dtype))
    return x, x.reshape(-1).view(STORAGE[dtype])


def fold(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``[..., tokens, n]`` as ``[heads, tokens, n]``."""
    *lead, tokens, n = shape
    return math.prod(lead), tokens, n


@inline
def divided(scratch: Any, channels: int) -> Any:
    """Two rows of numbers, and one of bytes with 8 more than `channels`."""
    return (
        scratch[:channels],
        scratch[channels : 2 * channels],
        scratch[2 * channels :].view(np.uint8),
    )


@inline
def following(head: int, token: int, tokens: int) -> Any:
    """Head and token of the next row; dividing would take as long as a row."""
    return (head + 1, 0) if token + 1 == tokens else (head, token + 1)
