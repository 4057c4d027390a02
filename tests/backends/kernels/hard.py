"""Values that tell kernels from the generic operations: ties, extremes, constants, zeros."""

from __future__ import annotations

import numpy as np

from kvcompress.arrays import FLOAT16_MAX, dtype_of, namespace_of

LARGEST = {"float16": FLOAT16_MAX, "bfloat16": 2.0**126, "float32": 2.0**126}
TINY = (
    0.0,
    -0.0,
    2.0**-149,
    -(2.0**-140),
    2.0**-126,
    -(2.0**-101),
    2.0**-100,
    2.0**-24,
    -(2.0**-14),
)


def values(shape: tuple[int, ...], dtype: str, *, bits: int, seed: int) -> np.ndarray:
    """Rows of several kinds, in random order.

    Parameters
    ----------
    bits : int
        Of the codes between which there shall be ties.
    """
    rng = np.random.default_rng(seed)
    rows, n = int(np.prod(shape[:-1])), shape[-1]
    x = rng.standard_normal((rows, n))
    kind = rng.integers(0, 10, rows)
    scale = 2.0 ** rng.integers(-8, 8, (rows, 1))
    x *= scale  # kinds 8 and 9 stay like this
    qmax = 2**bits - 1

    def put(number: int, new: np.ndarray) -> None:
        x[kind == number] = new[kind == number]

    ties = rng.integers(0, 2 * qmax + 1, (rows, n)) / 2
    ties[:, ::32], ties[:, min(n - 1, 1) :: 32] = 0, qmax  # in every group
    put(0, ties * scale)
    put(1, np.broadcast_to(x[:, :1], x.shape).copy())
    put(2, rng.choice(TINY, (rows, n)))
    put(3, LARGEST[dtype] * rng.choice([-1.0, 1.0, 0.0, 0.5], (rows, n)))
    put(4, scale * (1 + rng.integers(0, 4, (rows, n)) * 2.0**-10))
    put(5, np.where(rng.random((rows, n)) < 2 / n, x, 0.0))
    # As close to ties as rounding gets, between ends that are no powers of two.
    low, extent = scale * rng.standard_normal((2, rows, 1))
    near = low + abs(extent) * (rng.integers(0, qmax, (rows, n)) + 0.5) / qmax
    near[:, ::32], near[:, min(n - 1, 1) :: 32] = low, low + abs(extent)
    put(6, near)
    put(7, 2.0**-100 * (1 + rng.integers(0, 4, (rows, n)) * 2.0**-7))  # of a range that is zero
    with np.errstate(over="ignore"):
        return x.reshape(shape).astype(dtype_of(namespace_of(np), dtype))


def crowded(group: int) -> np.ndarray:
    """Groups ``[rows, group]`` of which some threads get nothing but values at the ends.

    The others get one of 256 values: what the ends lose by a cut, they may win.
    """
    member = np.arange(group)
    at_end = [
        place
        for share in (1, 2, 3)  # of four
        for place in (member // 8 % 4 < share, member % 8 < 2 * share)
    ]
    rows = [np.where(place, member % 2 * 255, value) for place in at_end for value in range(256)]
    return np.array(rows, "float32")
