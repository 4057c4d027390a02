"""Values as a gain and a direction: a token of small values may draw much attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from kvcompress.arrays import Array, array_namespace, device, quotient

Errors: TypeAlias = Callable[[], Array]
"""Computes, if asked, the squared error ``[heads, tokens]`` of every token, up to a factor."""


def norms(x: Array) -> tuple[Array, Array, Array]:
    """Norm of every token, without overflow.

    Parameters
    ----------
    x : array ``[..., tokens, channels]``, float32

    Returns
    -------
    scaled : array ``[..., tokens, channels]``, float32
        `x` over its largest magnitude.
    norm : array ``[..., tokens, 1]``, float32
        Of the tokens of `scaled`; 0 for those under 2**-60.
    peak : array of one number, float32
        What `x` was divided by.
    """
    xp = array_namespace(x)
    shape, size = (1,) * x.ndim, math.prod(x.shape)
    peak = xp.max(xp.abs(x)) if size else xp.zeros((), dtype=x.dtype, device=device(x))
    peak = xp.reshape(xp.where(peak > 0, peak, 1.0), shape)
    x = x / peak
    power = xp.vecdot(x, x)[..., None]
    return x, xp.sqrt(xp.where(power < 2.0**-120, 0.0, power)), peak


def inverse(norm: Array) -> Array:
    """Inverse of norms, 0 of 0."""
    return quotient(1.0, norm, ~(norm > 0))


def best_gain(along: Array, power: Array) -> Array:
    """Gain that brings a decoded direction closest: ``<x, d> / <d, d>``, 1 where that is no use."""
    xp = array_namespace(along, power)
    return xp.where(along > 0, along / xp.where(power > 0, power, 1.0), 1.0)
