"""Values as a gain and a direction: a token of small values may draw much attention."""

from __future__ import annotations

from kvcompress._namespace import Array, array_namespace


def split_norm(x: Array) -> tuple[Array, Array]:
    """Divide every token by its norm.

    Parameters
    ----------
    x : array ``[..., tokens, channels]``, float32

    Returns
    -------
    unit : array ``[..., tokens, channels]``, float32
        Zeros for a token of zeros.
    norm : array ``[..., tokens, 1]``, float32
    """
    xp = array_namespace(x)
    # By the largest magnitude first, so that squares neither overflow nor vanish.
    peak = xp.max(xp.abs(x), axis=-1, keepdims=True)
    x = x / xp.where(peak > 0, peak, 1.0)
    norm = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    return x / xp.where(norm > 0, norm, 1.0), norm * peak


def best_gain(along: Array, power: Array) -> Array:
    """Gain that brings a decoded direction closest: ``<x, d> / <d, d>``, 1 where that is no use."""
    xp = array_namespace(along, power)
    return xp.where(along > 0, along / xp.where(power > 0, power, 1.0), 1.0)
