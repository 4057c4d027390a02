"""What queries see of keys before RoPE: their second moment, averaged over distances."""

from __future__ import annotations

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.rope import RoPE

OCTAVES = 17
"""The farthest distance averaged over is ``2**OCTAVES - 1`` tokens."""


def moment_before_rope(moment: HostArray, rope: RoPE, /) -> HostArray:
    """Average the second moment of what multiplies a key before RoPE in the logits.

    A key ``x`` before RoPE and a query ``q`` before RoPE, ``d`` tokens later, have the logit
    ``x S R(d) q``, where ``R`` rotates and ``S`` multiplies what is rotated by the square of the
    scaling's magnitude. So errors of keys before RoPE count by the mean of ``S R(d) q q^T R(d)^T
    S``, which is exact here: a sum over distances of cosines and sines of sums and differences of
    the frequencies.

    Distances are 0 with the same weight as each octave from there to ``2**OCTAVES - 1``, and equal
    within an octave. Attention reads near keys most, and texts are short more often than long.

    Parameters
    ----------
    moment : array ``[..., head_dim, head_dim]``, float64
        Mean of ``q q^T`` of the queries before RoPE.
    rope : RoPE

    Returns
    -------
    array ``[..., head_dim, head_dim]``, float64
    """
    first, second = _pairs(rope)
    farthest = 2**OCTAVES if rope.depends_on_length else None
    frequency = np.zeros(rope.head_dim)
    frequency[first] = frequency[second] = rope.frequencies(farthest)
    sums = _mean_phase(frequency[:, None] + frequency)
    differences = _mean_phase(frequency[:, None] - frequency)
    # R(d) is cos(d f) of a channel and sin(d f) of its partner, with the sign of `turn`.
    turn = np.zeros((rope.head_dim, rope.head_dim))
    turn[first, second], turn[second, first] = -1.0, 1.0
    mean = (differences.real + sums.real) / 2 * moment
    mean = mean + (sums.imag + differences.imag) / 2 * (turn @ moment)
    mean = mean + (sums.imag - differences.imag) / 2 * (moment @ turn.T)
    mean = mean + (differences.real - sums.real) / 2 * (turn @ moment @ turn.T)
    gain = np.ones(rope.head_dim)
    gain[: rope.dim] = rope.magnitude**2
    seen: HostArray = gain[:, None] * mean * gain
    return seen


def _pairs(rope: RoPE) -> tuple[HostArray, HostArray]:
    """Channels ``[dim / 2]`` that are first, and second, in their pairs."""
    if rope.interleaved:
        return np.arange(0, rope.dim, 2), np.arange(1, rope.dim, 2)
    return np.arange(rope.dim // 2), np.arange(rope.dim // 2, rope.dim)


def _mean_phase(frequency: HostArray) -> HostArray:
    """Mean of ``exp(i d f)`` over the distances."""
    octaves = (
        np.exp(1j * 2**octave * frequency) * _mean_of_run(frequency, 2**octave)
        for octave in range(OCTAVES)
    )
    mean: HostArray = (1 + sum(octaves)) / (OCTAVES + 1)
    return mean


def _mean_of_run(frequency: HostArray, count: int) -> HostArray:
    """Mean of ``exp(i d f)`` over ``d`` from 0 to ``count - 1``: a geometric series."""
    half = frequency / 2
    step = np.sin(half)
    whole_turns = np.abs(step) < 1e-12
    size = np.sin(count * half) / (count * np.where(whole_turns, 1.0, step))
    return np.where(whole_turns, 1.0, size * np.exp(1j * (count - 1) * half))
