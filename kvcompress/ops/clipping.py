"""Clipped ranges: with few bits, finer steps for most of a group outweigh a few large errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from kvcompress.arrays import (
    Array,
    array_namespace,
    astype,
    device,
    first_largest,
    look_up,
    map_blocks,
)
from kvcompress.ops.affine import AXES, AffineSpec, quantize
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import SameValues, operation

CUTS = (0, 1, 2, 3)
"""How many sixteenths of its range a group may lose at either end."""

ERRORS = 2**20
"""Errors held at a time."""

LONGEST = 2**16
"""Values of a group whose errors int32 can add up for any number of bits; no error exceeds 2**14.

Kernels take no longer groups. The generic form adds them up part by part.
"""

_LOW = 15
"""Bits of a sum that are added up apart from the higher ones, of longer groups."""


def _examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor()
    for bits in inputs.choose(every=(1, 2, 3), usual=(2,)):
        for size in inputs.choose(every=(16, 64), usual=(64,)):
            for axis in AXES:
                label = f"{bits} bits, {size} a group, per {axis}"
                yield Call((x,), {"spec": AffineSpec(bits, size, axis)}, label)


@operation(_examples, SameValues())
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
    codes, minimum, maximum = quantize(x, spec=replace(spec, bits=8))
    minimum, maximum = astype(minimum, "float32"), astype(maximum, "float32")
    best = xp.reshape(_best_cuts(xp.astype(codes, xp.int32), spec, axis), minimum.shape)
    low, high = best // len(CUTS), best % len(CUTS)
    sixteenth = (maximum - minimum) / 16
    for cut in CUTS[1:]:
        # One by one: a product by 3 would be rounded, or not, as the compiler likes.
        minimum = xp.where(low >= cut, minimum + sixteenth, minimum)
        maximum = xp.where(high >= cut, maximum - sixteenth, maximum)
    minimum, maximum = (
        _spread(a, spec.group_size, axis, x.shape[axis]) for a in (minimum, maximum)
    )
    return xp.minimum(xp.maximum(astype(x, "float32"), minimum), maximum)


@cache
def errors(bits: int) -> np.ndarray:
    """Squared error of 256 values for all pairs of cuts, ``[pairs, 256]``, in 2**-16 range**2."""
    pairs = np.array(list(itertools.product(CUTS, CUTS)))
    start, stop = pairs[:, :1] / 16, 1 - pairs[:, 1:] / 16
    step = (stop - start) / (2**bits - 1)
    value = np.arange(256) / 255
    decoded = start + step * np.clip(np.rint((value - start) / step), 0, 2**bits - 1)
    return np.asarray(np.rint((value - decoded) ** 2 * 2**16), dtype="int32")


def _best_cuts(codes: Array, spec: AffineSpec, axis: int) -> Array:
    """Pair of cuts with the least error, for every group in turn; codes of 8 bits, as int32."""
    xp, size = array_namespace(codes), max(1, min(spec.group_size, codes.shape[axis]))
    # One row for a code, so that what is added are rows; the last, without errors, is for gaps.
    table = np.pad(errors(spec.bits), ((0, 0), (0, 1))).T
    codes = _fill_up(codes, size, axis, table.shape[0] - 1)
    inner = codes.shape[-1] if axis == -2 else 1
    groups = math.prod(codes.shape) // max(1, size * inner)
    codes = xp.reshape(codes, (groups, size, inner))
    rows = xp.asarray(np.ascontiguousarray(table), device=device(codes))

    def sums(codes: Array) -> Array:
        return xp.sum(look_up(rows, codes), axis=1, dtype=xp.int32)

    def block(codes: Array) -> Array:
        return first_largest(-sums(codes))

    at_a_time = max(1, ERRORS // max(1, min(size, LONGEST) * inner * table.shape[1]))
    if size <= LONGEST:
        return map_blocks(block, at_a_time, codes)
    codes = _fill_up(codes, LONGEST, -2, table.shape[0] - 1)
    parts = codes.shape[1] // LONGEST
    found = map_blocks(sums, at_a_time, xp.reshape(codes, (groups * parts, LONGEST, inner)))
    return _least_sum(xp.reshape(found, (groups, parts, inner, table.shape[1])))


def _fill_up(codes: Array, size: int, axis: int, code: int) -> Array:
    """Lengthen an axis by `code` to a multiple of `size`."""
    xp, gap = array_namespace(codes), list(codes.shape)
    gap[axis] = -codes.shape[axis] % size
    if not gap[axis]:
        return codes
    nothing = xp.full(tuple(gap), code, dtype=xp.int32, device=device(codes))
    return xp.concat([codes, nothing], axis=axis)


def _least_sum(parts: Array) -> Array:
    """Position of the least sum over axis 1 along the last axis, the first of equals.

    The sums need not fit int32: their lower bits are added up apart. They must fit 46 bits.
    """
    xp = array_namespace(parts)
    low = xp.sum(parts % 2**_LOW, axis=1, dtype=xp.int32)
    high = xp.sum(parts >> _LOW, axis=1, dtype=xp.int32) + (low >> _LOW)
    least = high == xp.min(high, axis=-1, keepdims=True)
    return first_largest(-xp.where(least, low % 2**_LOW, 2**_LOW))


def _spread(x: Array, size: int, axis: int, n: int) -> Array:
    """Repeat what every group has one of for its members."""
    xp = array_namespace(x)
    spread = xp.repeat(x, min(size, n), axis=axis)
    return spread[..., :n, :] if axis == -2 else spread[..., :n]
