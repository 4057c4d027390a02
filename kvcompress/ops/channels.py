"""Channels of keys, centred and made more alike: what a quantizer of whole tokens needs.

Some models have key channels that are nearly constant and a hundred times larger than others (a
bias on the key projection, RoPE at low frequencies). A rotation spreads them over all channels, and
their quantization error with them. The constant part of a channel adds the same number to all
logits of a query, which softmax does not see, and a transform per channel is undone exactly: so
each channel is centred, and divided by a power of its spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from kvcompress.arrays import (
    Array,
    HostArray,
    array_namespace,
    astype,
    device,
    dtype_name,
    extremes,
    look_up,
    quotient,
)
from kvcompress.ops.affine import TINY
from kvcompress.ops.casting import cast
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import Rounded, operation

SAMPLE = 256
"""Tokens, evenly spaced, that a reference is computed from, and up to twice as many."""

POWER = 0.75
"""Of the spread of a channel, that it is divided by: 0 leaves large channels the most precise, 1
gives all the same precision."""

_UNIT = 2.0**20
"""Sums are of whole numbers of this part of a channel's peak: the same in any order."""


def channel_reference(x: Array) -> tuple[Array, Array]:
    """Offset and scale of every channel.

    Both are the same bits on all libraries. A cache that grows may go on with those of its first
    tokens.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, floating
        Finite, magnitudes at most 2**120.

    Returns
    -------
    offset : array ``[heads, 1, channels]`` of the dtype of `x`
        About the mean.
    scale : array ``[heads, 1, channels]``, uint8
        128 more than the binary logarithm of the mean distance from the offset, rounded; 0 of a
        constant channel.
    """
    xp, (heads, tokens, channels) = array_namespace(x), x.shape
    shape, where = (heads, 1, channels), device(x)
    if not tokens:
        offset = xp.zeros(shape, dtype=x.dtype, device=where)
        return offset, xp.zeros(shape, dtype=xp.uint8, device=where)
    low, high = (xp.abs(xp.expand_dims(end, axis=-2)) for end in extremes(x, -2))
    peak = xp.where(low > high, low, high)
    zero = peak < TINY
    unit = quotient(_UNIT, peak, zero)
    sample = astype(x[:, :: max(1, tokens // SAMPLE), :], "float32")
    share = 1.0 / (_UNIT * sample.shape[1])

    def mean(numbers: Array) -> Array:
        whole = xp.astype(xp.round(numbers * unit), xp.int32)
        total = xp.sum(whole, axis=-2, keepdims=True, dtype=xp.int32)
        return astype(total, "float32") * share * peak

    centre = mean(sample)
    offset = cast(xp.where(xp.abs(centre) < TINY, 0.0, centre), dtype=dtype_name(x.dtype))
    spread = mean(xp.abs(sample - astype(offset, "float32")))
    # Not so little that others of the channel, divided by it, exceed float32.
    least = peak * 2.0**-24
    spread = xp.where(spread > least, spread, least)
    table = xp.asarray(_thresholds(), device=where)
    code = xp.searchsorted(table, xp.reshape(spread, (-1,)), side="right")
    return offset, xp.astype(xp.reshape(code, shape), xp.uint8)


def _examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor(extreme=False)
    offset, scale = channel_reference(x)
    yield Call((x, offset, scale))


@operation(_examples)
def normalize_channels(x: Array, offset: Array, scale: Array) -> Array:
    """Subtract the offset of every channel, and divide by the power of its spread.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, floating
    offset, scale : arrays ``[heads, 1, channels]``
        As `channel_reference` returned them.

    Returns
    -------
    array ``[heads, tokens, channels]``, float32
    """
    xp = array_namespace(x, offset, scale)
    factor = look_up(xp.asarray(1 / factors(), device=device(x)), xp.astype(scale, xp.int32))
    return (astype(x, "float32") - astype(offset, "float32")) * factor


def _restore_examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor(dtype="float32", extreme=False)
    offset, scale = channel_reference(inputs.tensor(extreme=False))
    yield Call((x, offset, scale), {"dtype": inputs.dtype})


def _restore_bound(call: Call) -> HostArray:
    """One rounding of the product and one of the sum, on either side."""
    x, offset, scale = call.arrays
    product = np.abs(x.astype("float64")) * factors()[scale].astype("float64")
    bound: HostArray = 2.0**-22 * (product + np.abs(offset.astype("float64"))) + 2.0**-126
    return bound


@operation(_restore_examples, Rounded(_restore_bound))
def restore_channels(x: Array, offset: Array, scale: Array, *, dtype: str) -> Array:
    """Undo `normalize_channels`.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, float32
    offset, scale : arrays ``[heads, 1, channels]``
    dtype : {"float16", "bfloat16", "float32"}
        Of the result; what exceeds float16 becomes its largest.

    Returns
    -------
    array ``[heads, tokens, channels]`` of `dtype`
        Magnitudes at most 2**126.
    """
    xp = array_namespace(x, offset, scale)
    factor = look_up(xp.asarray(factors(), device=device(x)), xp.astype(scale, xp.int32))
    # A damaged gain may have made them larger than any that was normalized.
    most = xp.full_like(factor, 2.0**125) / xp.where(factor > 1, factor, 1.0)
    x = xp.minimum(xp.maximum(x, -most), most) * factor + astype(offset, "float32")
    return cast(x, dtype=dtype)


@cache
def factors() -> HostArray:
    """What a channel of every scale is divided by: float32 ``[256]``."""
    powers = 2.0 ** (POWER * (np.arange(256) - 128.0))
    powers[0] = 1.0
    table: HostArray = powers.astype(np.float32)
    return table


@cache
def _thresholds() -> HostArray:
    """Spreads from which the scale is 1, 2, ..., 255; spreads below `TINY` count as none."""
    table: HostArray = np.maximum(2.0 ** (np.arange(255) - 127.5), TINY).astype(np.float32)
    return table
