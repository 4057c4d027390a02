"""Arrays of NumPy on the host, and a digest of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

HostArray: TypeAlias = np.ndarray[Any, Any]


def digest(arrays: Mapping[str, HostArray]) -> str:
    """SHA-256 over names, dtypes, shapes and values of arrays, in hexadecimal."""
    sha = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        sha.update(f"{name} {x.dtype.str} {x.shape}".encode())
        sha.update(x.tobytes())
    return sha.hexdigest()
