"""Constants of the rotated kernels, taken from the generic operations."""

from __future__ import annotations

from functools import cache

import numpy as np

from kvcompress.ops.hadamard import signs as rotation_signs
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells, levels

SIGNS = 256
"""Channels at most whose signs a kernel takes as arguments."""


NEVER = 1e30
"""Threshold that no number reaches."""


@cache
def steps(bits: int) -> tuple[int, int, np.ndarray]:
    """Where the code of a number rises, by the number rounded to steps that hold one rise at most.

    Returns
    -------
    per_unit, zero : int
        Step of a number x: `zero` and ``x * per_unit`` rounded to a whole number, half to either.
    table : array ``[steps]`` of (threshold, code)
        A number has that code, or from `threshold` on the next. The first and the last step also
        stand for all numbers beyond.
    """
    codes = cells(bits).astype("int64")
    rises = np.flatnonzero(np.diff(codes)) + 1
    if np.any(np.diff(codes) > 1):
        raise ValueError(f"a cell of {bits} bits lacks codes between it and its neighbour")
    thresholds = rises / CELLS_PER_UNIT - LARGEST
    per_unit = 1
    while 1 / per_unit >= np.diff(thresholds).min():
        per_unit *= 2
    zero = per_unit * LARGEST + 1
    start = (np.arange(2 * zero + 1) - zero - 0.5) / per_unit
    code = np.searchsorted(thresholds, start)
    after = np.append(thresholds, NEVER)[code]
    table = np.zeros(len(start), [("threshold", "f4"), ("code", "u4")])
    table["threshold"] = np.where(after <= start + 1 / per_unit, after, NEVER)
    table["code"] = code
    return per_unit, zero, table


@cache
def signs(channels: int, seed: int) -> tuple[np.uint64, ...]:
    """Signs of the rotation as 256 bits: 1 is minus."""
    bits = np.zeros(SIGNS, "uint8")
    bits[:channels] = rotation_signs(channels, seed) < 0
    return tuple(np.packbits(bits, bitorder="little").view("<u8").astype("uint64"))


def header(bits: tuple[int, ...]) -> str:
    """Return the tables as C++: ``Quantizer<BITS>``, see `steps`, and its levels."""
    lines = [
        "struct Step { float threshold; unsigned code; };",
        "template <int BITS> struct Quantizer;",
    ]
    for n in bits:
        per_unit, zero, table = steps(n)
        numbers = ", ".join(f"{value}.0f / 4096" for value in (levels(n) * 4096).astype(int))
        rises = ", ".join(f"{{{float(threshold)}f, {code}u}}" for threshold, code in table)
        lines += [
            f"__device__ const float LEVELS_{n}[] = {{{numbers}}};",
            f"__device__ const Step STEPS_{n}[] = {{{rises}}};",
            f"template <> struct Quantizer<{n}> {{",
            f"    static constexpr int PER_UNIT = {per_unit}, ZERO = {zero}, STEPS = {len(table)};",
            f"    static __device__ float level(int i) {{ return LEVELS_{n}[i]; }}",
            f"    static __device__ Step step(int i) {{ return STEPS_{n}[i]; }}",
            "};",
        ]
    return "\n".join(lines)
