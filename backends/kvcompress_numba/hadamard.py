"""The Hadamard transform of a row, in place, in parts of kernels.

It takes the same sums and differences as the generic form; that one also moves its numbers about,
but they come back to where they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import inline
from kvcompress_numba.vectors import load, splat, store

_ONE = np.float32(1)


@inline
def _three_rounds(y: Any, i: int, step: int, scale: Any) -> None:
    """Rounds at distances of `step`, twice and four times that, in registers; then scaled."""
    a0, a1 = load(y, i), load(y, i + step)
    a2, a3 = load(y, i + 2 * step), load(y, i + 3 * step)
    a4, a5 = load(y, i + 4 * step), load(y, i + 5 * step)
    a6, a7 = load(y, i + 6 * step), load(y, i + 7 * step)
    b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
    b4, b5, b6, b7 = a4 + a5, a4 - a5, a6 + a7, a6 - a7
    a0, a1, a2, a3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
    a4, a5, a6, a7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
    store(y, i, (a0 + a4) * splat(scale))
    store(y, i + step, (a1 + a5) * splat(scale))
    store(y, i + 2 * step, (a2 + a6) * splat(scale))
    store(y, i + 3 * step, (a3 + a7) * splat(scale))
    store(y, i + 4 * step, (a0 - a4) * splat(scale))
    store(y, i + 5 * step, (a1 - a5) * splat(scale))
    store(y, i + 6 * step, (a2 - a6) * splat(scale))
    store(y, i + 7 * step, (a3 - a7) * splat(scale))


@inline
def _rounds(y: Any, n: int, scale: Any) -> None:
    vectors = n & -LANES
    step = LANES if vectors else 1
    while vectors and 8 * step <= n:
        factor = scale if 8 * step == n else _ONE
        for start in range(0, n, 8 * step):
            for i in range(start, start + step, LANES):
                _three_rounds(y, i, step, factor)
        step *= 8
        if step == n:
            return
    while step < n:
        for start in range(0, n, 2 * step):
            for i in range(start, start + step, LANES if vectors else 1):
                if vectors:
                    a, b = load(y, i), load(y, i + step)
                    store(y, i, a + b)
                    store(y, i + step, a - b)
                else:
                    c, d = y[i], y[i + step]
                    y[i], y[i + step] = c + d, c - d
        step *= 2
    for i in range(0, vectors, LANES):
        store(y, i, load(y, i) * splat(scale))
    for i in range(vectors, n):
        y[i] *= scale


@inline
def transform(y: Any, n: int, scale: Any) -> None:
    """Hadamard transform of ``y[:n]``, of which `butterflies` have been taken if n >= 16."""
    if n == 128:
        _rounds(y, 128, scale)
    elif n == 64:
        _rounds(y, 64, scale)
    else:
        _rounds(y, n, scale)
