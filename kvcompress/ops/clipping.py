"""Clipped ranges: with few bits, finer steps for most of a group outweigh what the ends lose."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np

from kvcompress._namespace import Array, array_namespace, astype, device, look_up
from kvcompress.ops.affine import AffineSpec, quantize

CUTS = (0, 1, 2, 3)
"""How many sixteenths of its range a group may lose at either end."""


def clip_groups(x: Array, *, spec: AffineSpec) -> Array:
    """Clip every group of `x` to the range in which `quantize` has the least squared error.

    All pairs of `CUTS` are tried on the values rounded to 8 bits of their group's range. The errors
    are whole numbers, so every library chooses the same range, the first of equals.

    Parameters
    ----------
    x : array ``[..., tokens, channels]``, floating
        As for `quantize`.
    spec : AffineSpec
        Of the quantizer to come.

    Returns
    -------
    array ``[..., tokens, channels]``, float32
    """
    xp = array_namespace(x)
    axis = -2 if spec.axis == "channel" else -1
    # Eight bits are bytes, which packing leaves alone.
    codes, lower, upper = quantize(x, spec=replace(spec, bits=8))
    lower, upper = astype(lower, "float32"), astype(upper, "float32")
    codes = xp.astype(codes, xp.int32)
    sums = []
    for table in errors(spec.bits):
        error = look_up(xp.asarray(table, device=device(x)), codes)
        sums.append(_group_sums(error, spec.group_size, axis))
    best = xp.argmin(xp.stack(sums), axis=0)
    low, high = best // len(CUTS), best % len(CUTS)
    sixteenth = (upper - lower) / 16
    for cut in CUTS[1:]:
        # One by one: a product by 3 would be rounded, or not, as the compiler likes.
        lower = xp.where(low >= cut, lower + sixteenth, lower)
        upper = xp.where(high >= cut, upper - sixteenth, upper)
    lower, upper = (_spread(a, spec.group_size, axis, x.shape[axis]) for a in (lower, upper))
    return xp.minimum(xp.maximum(astype(x, "float32"), lower), upper)


@cache
def errors(bits: int) -> np.ndarray:
    """Squared error of all 256 values for all pairs of cuts, ``[pairs, 256]``, in 2**-16 range**2.

    Sums over groups of up to 2**19 values fit int32.
    """
    pairs = np.array(list(itertools.product(CUTS, CUTS)))
    start, stop = pairs[:, :1] / 16, 1 - pairs[:, 1:] / 16
    step = (stop - start) / (2**bits - 1)
    value = np.arange(256) / 255
    decoded = start + step * np.clip(np.rint((value - start) / step), 0, 2**bits - 1)
    return np.asarray(np.rint((value - decoded) ** 2 * 2**16), dtype="int32")


def _group_sums(x: Array, size: int, axis: int) -> Array:
    """Sums of int32 groups along `axis`."""
    xp = array_namespace(x)
    *lead, tokens, channels = x.shape
    missing = -x.shape[axis] % size
    if missing:
        gap = (*lead, missing, channels) if axis == -2 else (*lead, tokens, missing)
        x = xp.concat([x, xp.zeros(gap, dtype=x.dtype, device=device(x))], axis=axis)
    if axis == -2:
        x = xp.reshape(x, (*lead, (tokens + missing) // size, size, channels))
    else:
        x = xp.reshape(x, (*lead, tokens, (channels + missing) // size, size))
    return xp.sum(x, axis=axis, dtype=x.dtype)


def _spread(ends: Array, size: int, axis: int, n: int) -> Array:
    """Repeat the end of every group for its members."""
    xp = array_namespace(ends)
    spread = xp.repeat(ends, size, axis=axis)
    return spread[..., :n, :] if axis == -2 else spread[..., :n]
