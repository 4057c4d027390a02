"""Arrays of NumPy on the host: a digest of their values, and roots by bisection."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

HostArray: TypeAlias = np.ndarray[Any, Any]


def digest(arrays: Mapping[str, HostArray]) -> str:
    """SHA-256 over names, dtypes, shapes and values of arrays, in hexadecimal."""
    sha = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        sha.update(f"{name} {x.dtype.str} {x.shape}".encode())
        # Not of a copy of all of it, which may be large.
        whole: Any = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        sha.update(whole)
    return sha.hexdigest()


def bisect(below: Callable[[Any], Any], low: Any, high: Any, *, steps: int) -> Any:
    """Narrow an interval around where `below` ceases to be true; return its upper end.

    Parameters
    ----------
    below : callable ``x -> bool``
        True up to some number and false from there on; or of arrays, element by element.
    low, high : float or array, float64
    steps : int
        Each halves the interval.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        under = below(middle)
        if isinstance(under, np.ndarray):
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        else:
            low, high = (middle, high) if under else (low, middle)
    return high
