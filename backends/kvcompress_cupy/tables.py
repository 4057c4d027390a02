"""Constants of the kernels, taken from the generic operations."""

from __future__ import annotations

from functools import cache

import numpy as np

from kvcompress.ops.allocated import DEEPEST
from kvcompress.ops.clipping import errors
from kvcompress.ops.hadamard import signs as rotation_signs
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, all_levels, cells, levels

BEYOND = 32
"""No number is as large: a rotated row of 256 channels and root mean square 1 holds at most 16."""

SHIFTED = 0x4B400000
"""Bits of 1.5 * 2**23: added to a float32, this leaves it, rounded, in the low bits."""

CLIPPED_BITS = range(2, 9)
"""Bits for which ranges can be chosen: with fewer, sums of errors exceed 16 bits."""

SIGNS = np.dtype([("lanes", "u4", (8,))])
"""`struct Signs` of the kernels."""


@cache
def steps(bits: int) -> tuple[int, np.ndarray]:
    """Where the code of a number rises: in every step of cells once at most.

    A cell is a number times `CELLS_PER_UNIT`, rounded down. Added to what the table says of its
    step, the bits of the cell, `SHIFTED`, leave the code in the highest byte.

    Returns
    -------
    shift : int
        A step is ``2**shift`` cells.
    table : array ``[steps]``, uint32
        From cell 0 on up to `BEYOND`, then from ``-BEYOND`` up to 0: the lowest bits of a step's
        number are its place.
    """
    codes = cells(bits).astype("int64")
    rises = np.flatnonzero(np.diff(codes)) + 1 - LARGEST * CELLS_PER_UNIT
    if np.any(np.diff(codes) > 1):
        raise ValueError(f"a cell of {bits} bits lacks codes between it and its neighbour")
    shift = 0
    while shift < 10 and len(np.unique(rises >> (shift + 1))) == len(rises):
        shift += 1
    count = BEYOND * CELLS_PER_UNIT >> shift
    first = np.concatenate([np.arange(count), np.arange(-count, 0)]) << shift
    code = np.searchsorted(rises, first, side="right")
    rise = np.append(rises, first.max())[np.minimum(code, len(rises))]
    never = 2**20
    rise = np.where((code < len(rises)) & (rise < first + 2**shift), rise, never)
    table = (code << 24) + 2**24 - rise - SHIFTED
    return shift, (table % 2**32).astype("uint32")


@cache
def signs(channels: int, seed: int, *, run: int, itemsize: int) -> np.ndarray:
    """Signs of the rotation for every thread of a row: 1 is minus.

    Parameters
    ----------
    run : int
        Neighbouring channels that a thread holds, see ``rotation.cuh``.
    itemsize : int
        Bytes of a value. Shifted left by i, the highest bit of each value in a word of four bytes
        is the sign of that value in the thread's i-th word.
    """
    lanes, per_word = channels // 32, 4 // itemsize
    minus = (rotation_signs(channels, seed) < 0).reshape(-1, lanes, run)
    minus = np.swapaxes(minus, 0, 1).reshape(lanes, 32 // per_word, per_word).astype("uint32")
    top = 8 * itemsize * (np.arange(per_word) + 1) - 1
    places = top - np.arange(32 // per_word)[:, None]
    out = np.zeros((), SIGNS)
    out["lanes"][:lanes] = np.sum(minus << places.astype("uint32"), axis=(1, 2), dtype="uint32")
    return out


def header(bits: tuple[int, ...]) -> str:
    """Return the tables as C++: ``Quantizer<BITS>``, see `steps`, and its levels."""
    lines = ["template <int BITS> struct Quantizer;"]
    for n in bits:
        shift, table = steps(n)
        numbers = ", ".join(f"{value}.0f / 4096" for value in (levels(n) * 4096).astype(int))
        lines += [
            f"__device__ const float LEVELS_{n}[] = {{{numbers}}};",
            f"__device__ const unsigned STEPS_{n}[] = {{{', '.join(map(str, table))}}};",
            f"template <> struct Quantizer<{n}> {{",
            f"    static constexpr int SHIFT = {shift}, STEPS = {len(table)};",
            f"    static __device__ float level(int i) {{ return LEVELS_{n}[i]; }}",
            f"    static __device__ unsigned step(int i) {{ return STEPS_{n}[i]; }}",
            "};",
        ]
    return "\n".join(lines)


def all_steps_header() -> str:
    """Return ``code_of(value, depth)`` as C++, for depths of 0 to 8 bits; see `steps`."""
    known = [steps(bits) for bits in range(1, DEEPEST + 1)]
    offsets = np.cumsum([0] + [len(table) for _, table in known])[:-1]
    entries = ", ".join(str(entry) for _, table in known for entry in table)
    masks = [len(table) - 1 for _, table in known]
    return f"""
struct Steps {{ int shift, mask, offset; }};
__device__ const unsigned ALL_STEPS[] = {{{entries}}};
__device__ const Steps STEPS_OF[] = {{
    {", ".join(f"{{{s}, {m}, {o}}}" for (s, _), m, o in zip(known, masks, offsets, strict=True))}}};

__device__ __forceinline__ unsigned code_of(float value, int depth) {{
    if (depth == 0) return 0;
    const Steps steps = STEPS_OF[depth - 1];
    const unsigned cell = __float_as_uint(__fmaf_rd(value, {CELLS_PER_UNIT}.0f, 12582912.0f));
    return (cell + ALL_STEPS[steps.offset + (cell >> steps.shift & steps.mask)]) >> 24;
}}"""


def all_levels_header() -> str:
    """Return ``level_of(code, depth)`` as C++, for depths of 0 to 8 bits."""
    numbers = ", ".join(f"{int(level * 4096)}.0f / 4096" for level in all_levels())
    return f"""
__device__ const float ALL_LEVELS[] = {{{numbers}}};

__device__ __forceinline__ float level_of(unsigned code, int depth) {{
    return ALL_LEVELS[256 * depth + code];
}}"""


def all_errors_header() -> str:
    """Return ``ERRORS`` as C++, for all `CLIPPED_BITS`: of every code, two halves of the ranges.

    A word holds two of `kvcompress.ops.clipping.errors`, the lower first.
    """
    known = np.stack([errors(bits).T for bits in CLIPPED_BITS]).astype("uint32")
    if known.max() * 16 >= 2**16:
        raise ValueError("the errors of 16 values exceed 16 bits")
    words = (known[..., ::2] | known[..., 1::2] << 16).reshape(-1, 4)
    entries = ", ".join(f"{{{', '.join(map(str, row))}}}" for row in words)
    return f"""
constexpr int FEWEST_BITS = {CLIPPED_BITS[0]};
__device__ const uint4 ERRORS[] = {{{entries}}};"""
