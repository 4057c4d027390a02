"""Codes of different widths side by side: every component gets the bits it deserves.

Bits go, one by one, where they lower the squared error most: reverse water-filling in whole bits,
with the measured distortions of the quantizer in place of the rate-distortion function (Gersho and
Gray 1992, Vector Quantization and Signal Compression, section 8.4). How many bits there are is
static; which component gets them is data, so all shapes are static.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcompress.arrays import Array, array_namespace, device, look_up, map_blocks
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.lloyd_max import (
    CELLS_PER_UNIT,
    LARGEST,
    all_cells,
    all_levels,
    all_rounded,
    distortions,
)
from kvcompress.ops.outliers import largest
from kvcompress.ops.packing import pack, unpack
from kvcompress.ops.registry import SameValues, operation

DEEPEST = 8
"""Bits that one component can get."""

SLOTS = 2**20
"""Bits held as numbers at a time."""


def allocate(variances: Array, bits: int) -> Array:
    """Share bits among the components of every head.

    Parameters
    ----------
    variances : array ``[heads, channels]``, float32
    bits : int
        Bits of all components together, at most ``8 * channels``.

    Returns
    -------
    array ``[heads, channels]``, uint8
        Bits of every component, 0 to 8; they add up to `bits`.
    """
    xp = array_namespace(variances)
    heads, channels = variances.shape
    # Distortion is convex in the bits: the largest gains of a component are its first.
    table = distortions()
    gains = xp.asarray(table[:-1] - table[1:], device=device(variances))
    gains = xp.reshape(variances[:, :, None] * gains, (heads, channels * DEEPEST))
    component = largest(gains, bits) // DEEPEST
    # A comparison, for the standard has no histogram.
    chosen = component[:, :, None] == xp.arange(channels, device=device(variances))
    return xp.astype(xp.sum(xp.astype(chosen, xp.int32), axis=1), xp.uint8)


def _quantize_examples(inputs: Inputs) -> Iterator[Call]:
    heads, _, channels = inputs.shape
    x, variances = inputs.tensor(), inputs.tensor((heads, channels), extreme=False) ** 2
    every = (1, 2 * channels + 1, DEEPEST * channels)
    for bits in inputs.choose(every=every, usual=(3 * channels,)):
        label = f"{bits / channels:g} bits a value"
        yield Call((x, allocate(variances, bits)), {"bits": bits}, label)


@operation(_quantize_examples, dtypes=("float32",))
def quantize_allocated(x: Array, component_bits: Array, *, bits: int) -> Array:
    """Quantize to the Lloyd-Max levels for normal numbers, and pack.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, float32
        Of variance about 1.
    component_bits : array ``[heads, channels]``, uint8
        Bits of every component, 0 to 8.
    bits : int
        What `component_bits` add up to in every head.

    Returns
    -------
    array ``[heads, tokens, packed_size(bits, 1)]``, uint8
    """
    xp = array_namespace(x, component_bits)
    component, weight = _slots(component_bits, bits)
    select = xp.astype(component, xp.float32)

    def block(rows: Array) -> Array:
        # Tokens first, to be cut into blocks. By matrix products, which every library is quick at;
        # whole numbers below 2**8 stay exact.
        codes = _looked_up(all_cells(), xp.permute_dims(rows, (1, 0, 2)), component_bits)
        slots = xp.floor((xp.astype(codes, xp.float32) @ select) / weight)
        slots = xp.astype(slots - 2.0 * xp.floor(slots / 2), xp.uint8)
        return xp.permute_dims(pack(slots, 1), (1, 0, 2))

    count = _rows(x.shape[0], bits)
    return xp.permute_dims(map_blocks(block, count, xp.permute_dims(x, (1, 0, 2))), (1, 0, 2))


def _dequantize_examples(inputs: Inputs) -> Iterator[Call]:
    for call in _quantize_examples(inputs):
        x, component_bits = call.arrays
        packed = quantize_allocated(x, component_bits, **call.static)
        yield Call((packed, component_bits), call.static, call.label, source=x)


def round_allocated(x: Array, component_bits: Array) -> Array:
    """What `dequantize_allocated` makes of what `quantize_allocated` makes of `x`, at once."""
    return _looked_up(all_rounded(), x, component_bits)


@operation(_dequantize_examples, SameValues(), dtypes=("float32",))
def dequantize_allocated(packed: Array, component_bits: Array, *, bits: int) -> Array:
    """Undo `quantize_allocated`.

    Returns
    -------
    array ``[heads, tokens, channels]``, float32
        Levels; 0 where a component has no bits.
    """
    xp = array_namespace(packed, component_bits)
    component, weight = _slots(component_bits, bits)
    table = xp.asarray(all_levels(), device=device(packed))
    join = xp.matrix_transpose(xp.astype(component, xp.float32) * weight)
    first = xp.astype(component_bits, xp.int32)[:, None, :] * 2**DEEPEST

    def block(rows: Array) -> Array:
        slots = unpack(xp.permute_dims(rows, (1, 0, 2)), 1, bits)
        index = xp.astype(xp.astype(slots, xp.float32) @ join, xp.int32) + first
        return xp.permute_dims(look_up(table, index), (1, 0, 2))

    count = _rows(packed.shape[0], bits)
    return xp.permute_dims(map_blocks(block, count, xp.permute_dims(packed, (1, 0, 2))), (1, 0, 2))


def _looked_up(cells: np.ndarray, x: Array, component_bits: Array) -> Array:
    """Entries of a table over the cells of every depth, for the cell and depth of every number."""
    xp = array_namespace(x, component_bits)
    count = 2 * LARGEST * CELLS_PER_UNIT
    cell = xp.floor(xp.clip(x, -float(LARGEST), float(LARGEST)) * CELLS_PER_UNIT)
    cell = xp.clip(cell + count / 2, 0.0, count - 1.0)
    cell = xp.astype(cell, xp.int32) + xp.astype(component_bits, xp.int32)[:, None, :] * count
    table = xp.asarray(cells, device=device(x))
    return look_up(table, cell)


def _rows(heads: int, bits: int) -> int:
    """Tokens in work at a time."""
    return max(1, SLOTS // max(1, heads * bits))


def _slots(component_bits: Array, bits: int) -> tuple[Array, Array]:
    """Which component every bit of a token belongs to, and what it is worth there.

    Returns
    -------
    component : array ``[heads, channels, bits]``, bool
    weight : array ``[heads, 1, bits]``, float32
        A power of two.
    """
    xp = array_namespace(component_bits)
    wide = xp.astype(component_bits, xp.int32)
    end = xp.cumulative_sum(wide, axis=-1)[:, :, None]
    start = end - wide[:, :, None]
    slot = xp.arange(bits, dtype=end.dtype, device=device(component_bits))
    component = (start <= slot) & (slot < end)
    place = xp.sum(xp.where(component, slot - start, 0), axis=1, keepdims=True)
    powers = xp.asarray(
        [2.0**i for i in range(DEEPEST)], dtype=xp.float32, device=device(component_bits)
    )
    return component, look_up(powers, place)
