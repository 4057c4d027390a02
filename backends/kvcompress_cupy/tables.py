"""Constants of the rotated kernels, taken from the generic operations."""

from __future__ import annotations

from functools import cache

import numpy as np

from kvcompress.ops.hadamard import signs as rotation_signs
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells, levels

SIGNS = 256
"""Channels at most whose signs a kernel takes as arguments."""


@cache
def steps(bits: int) -> tuple[int, np.ndarray]:
    """Codes of all cells, in runs of cells so long that the code rises at most once in each.

    Returns
    -------
    shift : int
        A run has ``2**shift`` cells.
    steps : NumPy array, uint32
        Of every run: its first code, plus 256 times the first cell with the next code, a cell of
        a later run if there is none.
    """
    codes = cells(bits).astype("int64")
    rises = np.flatnonzero(np.diff(codes)) + 1
    if not np.array_equal(np.diff(codes)[rises - 1], np.ones(len(rises))):
        raise ValueError(f"a cell of {bits} bits lacks codes between it and its neighbour")
    shift = int(np.diff(rises).min()).bit_length() - 1
    start = np.arange(0, len(codes), 2**shift)
    next_rise = np.append(rises, len(codes))[np.searchsorted(rises, start, side="right")]
    return shift, (codes[start] + 256 * next_rise).astype("uint32")


@cache
def signs(channels: int, seed: int) -> tuple[np.uint64, ...]:
    """Signs of the rotation as 256 bits: 1 is minus."""
    bits = np.zeros(SIGNS, "uint8")
    bits[:channels] = rotation_signs(channels, seed) < 0
    return tuple(np.packbits(bits, bitorder="little").view("<u8").astype("uint64"))


def header(bits: tuple[int, ...]) -> str:
    """Return the tables as C++: ``Quantizer<BITS>``, with `level` and `step` by their numbers."""
    lines = ["template <int BITS>", "struct Quantizer;"]
    for n in bits:
        shift, table = steps(n)
        values = ", ".join(f"{value}.0f / 4096" for value in (levels(n) * 4096).astype(int))
        lines += [
            f"__device__ const float LEVELS_{n}[] = {{{values}}};",
            f"__device__ const unsigned STEPS_{n}[] = {{{', '.join(map(str, table))}}};",
            "template <>",
            f"struct Quantizer<{n}> {{",
            f"    static constexpr int CELLS = {len(cells(n))}, PER_UNIT = {CELLS_PER_UNIT};",
            f"    static constexpr int ZERO = {LARGEST * CELLS_PER_UNIT};",
            f"    static constexpr int STEPS = {len(table)}, SHIFT = {shift};",
            f"    static __device__ float level(int i) {{ return LEVELS_{n}[i]; }}",
            f"    static __device__ unsigned step(int i) {{ return STEPS_{n}[i]; }}",
            "};",
        ]
    return "\n".join(lines)
