"""Norms as bytes: in small equal ratios about a usual norm, in larger ones the farther from it."""

from __future__ import annotations

import math

from kvcompress.arrays import Array, array_namespace

USUAL = 128
"""Byte of a norm that is as usual; 0 is for a norm of zero."""

STEP = 12 / 254
"""Octaves between the norms that neighbouring bytes stand for, where steps are equal."""

EQUAL = 53
"""Steps on either side of the usual norm that are equal: 2.5 octaves."""

GROWTH = 0.0826
"""Logarithm of the ratio of neighbouring steps beyond: those 127 from the middle reach 250 octaves,
which is all that float32 and bfloat16 can hold; at 100 times the usual norm a step is 0.4."""

LARGEST = 125.0
"""Largest binary logarithm of a number that is decoded."""


def norm_bytes(log_norm: Array, usual: Array) -> Array:
    """Bytes from 1 to 255, as float32, for binary logarithms of norms.

    Parameters
    ----------
    log_norm, usual : arrays, float32
        Binary logarithms of the norms, and of usual norms.
    """
    xp = array_namespace(log_norm)
    steps = (log_norm - usual) / STEP
    size = xp.abs(steps)
    far = EQUAL + xp.log1p(GROWTH * xp.clip(size - EQUAL, 0.0, None)) / GROWTH
    size = xp.where(size > EQUAL, far, size)
    return xp.clip(xp.round(xp.sign(steps) * size) + USUAL, 1.0, 255.0)


def octaves(byte: Array) -> Array:
    """Binary logarithms of the ratios to a usual norm that bytes, as float32, stand for."""
    xp = array_namespace(byte)
    steps = byte - USUAL
    size = xp.abs(steps)
    far = EQUAL + xp.expm1(GROWTH * xp.clip(size - EQUAL, 0.0, None)) / GROWTH
    return STEP * xp.sign(steps) * xp.where(size > EQUAL, far, size)


def power_of_two(exponent: Array, most: float) -> Array:
    """Two to the power of numbers, those above `most` saturated; 1 exactly for 0."""
    xp = array_namespace(exponent)
    return xp.exp(xp.clip(exponent, -LARGEST, most) * math.log(2.0))
