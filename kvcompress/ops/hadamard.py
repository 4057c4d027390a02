"""Random rotations by the fast Hadamard transform: every channel spread over all of them.

A vector is multiplied by random signs and then by an orthogonal matrix all of whose entries have
about the same magnitude, so that no channel stands out any more and the coordinates are close to
normal (Ailon and Chazelle 2009, doi 10.1137/060673096). For ``n = m * 2**k`` channels, m odd, the
matrix is the Kronecker product of the Hartley matrix of order m and the Hadamard matrix of order
``2**k``. Both are orthogonal and symmetric, hence their own inverse; the Hadamard matrix takes only
sums and differences in a fixed order, so for m = 1 all libraries agree bit for bit.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from kvcompress.arrays import Array, array_namespace, device


def hadamard(x: Array, *, seed: int) -> Array:
    """Rotate every vector along the last axis.

    Parameters
    ----------
    x : array ``[..., channels]``, float32
        Magnitudes at most ``2**126 / channels``.
    seed : int
        Of the signs.

    Returns
    -------
    array ``[..., channels]``, float32
        Of the same norms.
    """
    return _transform(x * _on(x, signs(x.shape[-1], seed)))


def inverse_hadamard(x: Array, *, seed: int) -> Array:
    """Undo `hadamard`."""
    return _transform(x) * _on(x, signs(x.shape[-1], seed))


def _transform(x: Array) -> Array:
    xp, shape = array_namespace(x), x.shape
    power = shape[-1] & -shape[-1]
    odd = shape[-1] // power
    x = xp.reshape(x, (*shape[:-1], odd, power))
    rounds = power.bit_length() - 1
    # Two at a time, so that what is written between them is half as much.
    for bits in [1] * (rounds % 2) + [2] * (rounds // 2):
        parts = [x[..., i :: 2**bits] for i in range(2**bits)]
        # Each transforms the lowest bit of the channel's number and makes it the highest.
        for _ in range(bits):
            pairs = list(zip(parts[::2], parts[1::2], strict=True))
            parts = [a + b for a, b in pairs] + [a - b for a, b in pairs]
        x = xp.concat(parts, axis=-1)
    if odd > 1:
        x = xp.matmul(_on(x, _hartley(odd)), x)
    return xp.reshape(x, shape) * (1 / math.sqrt(power))


@cache
def signs(n: int, seed: int) -> np.ndarray:
    """Signs of a rotation, from the raw bits of PCG64, which NumPy promises never to change."""
    words = np.random.PCG64(seed).random_raw(-(-n // 64)).astype("<u8")
    bits = np.unpackbits(words.view("uint8"), bitorder="little")[:n]
    return 1 - 2 * bits.astype("float32")


@cache
def _hartley(n: int) -> np.ndarray:
    """Matrix of the discrete Hartley transform (Bracewell 1983, doi 10.1364/JOSA.73.001832)."""
    angle = 2 * np.pi / n * (np.outer(np.arange(n), np.arange(n)) % n)
    return np.asarray((np.cos(angle) + np.sin(angle)) / math.sqrt(n), dtype="float32")


def _on(x: Array, constant: np.ndarray) -> Array:
    return array_namespace(x).asarray(constant, device=device(x))
