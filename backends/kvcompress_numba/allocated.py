"""Codes of different widths side by side: `quantize_allocated` and `dequantize_allocated`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kvcompress.ops.allocated import DEEPEST
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, all_cells, all_levels
from kvcompress.ops.packing import packed_size
from kvcompress_numba.arrays import NDArray, Rows, empty, fold, following, rows
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.packing import pack_row, unpack_row
from kvcompress_numba.threads import kernel, run
from kvcompress_numba.vectors import load_bytes, load_word, store_bytes

_CELLS, _MIDDLE = np.float32(CELLS_PER_UNIT), np.float32(LARGEST * CELLS_PER_UNIT)
_COUNT, _CODES = 2 * LARGEST * CELLS_PER_UNIT, 2**DEEPEST
_ZERO, _LAST = np.float32(0), np.float32(_COUNT - 1)
_GATHER, _TOP = np.uint64(0x0102040810204080), np.uint64(56)


def quantize_allocated(x: NDArray, component_bits: NDArray, *, bits: int) -> NDArray:
    """See `kvcompress.ops.quantize_allocated`."""
    heads, tokens, channels = fold(x.shape)
    codes, flat = empty((heads, tokens, packed_size(bits, 1)), "uint8")
    tables = _widths(component_bits, bits), all_cells(), _bits_of_codes()
    args = rows(x), tokens, channels, bits, *tables, flat
    run(_quantize, heads * tokens, channels, _room(bits), *args)
    return codes


def dequantize_allocated(packed: NDArray, component_bits: NDArray, *, bits: int) -> NDArray:
    """See `kvcompress.ops.dequantize_allocated`."""
    heads, tokens, _ = fold(packed.shape)
    channels = component_bits.shape[-1]
    out, flat = empty((heads, tokens, channels), "float32")
    args = rows(packed), tokens, channels, bits, _widths(component_bits, bits), all_levels(), flat
    run(_dequantize, heads * tokens, channels, _room(bits), *args)
    return out


def _widths(component_bits: NDArray, bits: int) -> NDArray:
    """Bits of every component, as a flat array: those beyond `bits` are none."""
    ends = np.minimum(np.cumsum(np.minimum(component_bits, DEEPEST), axis=-1, dtype=np.int64), bits)
    return np.diff(ends, axis=-1, prepend=0).reshape(-1)


@cache
def _bits_of_codes() -> NDArray:
    """Bits of all codes, lowest first, a byte each; 16 bytes for a code."""
    table = np.zeros((_CODES, LANES), np.uint8)
    table[:, :DEEPEST] = np.arange(_CODES)[:, None] >> np.arange(DEEPEST) & 1
    return table.reshape(-1)


def _room(bits: int) -> int:
    """Scratch for a byte for every bit, and what is written beyond them."""
    return (bits + LANES + 3) // 4


@kernel
def _quantize(
    x: Rows,
    tokens: int,
    channels: int,
    bits: int,
    widths: Any,
    cells: Any,
    bits_of_codes: Any,
    codes: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    flat, head, token = x
    slots = scratch.view(np.uint8)
    size = (bits + 7) >> 3
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        first, component = h * head + t * token, h * channels
        h, t = following(h, t, tokens)
        at = 0
        for c in range(channels):
            width = widths[component + c]
            place = np.floor(flat[first + c] * _CELLS) + _MIDDLE
            cell = np.uint32(min(max(place, _ZERO), _LAST))
            code = cells[np.uint32(width * _COUNT) + cell]
            # Whatever is written too much, the next component or `pack_row` overwrites.
            store_bytes(slots, at, load_bytes(bits_of_codes, np.int64(code) * LANES))
            at += width
        pack_row(slots, bits, 1, codes, unit * size)


@kernel
def _dequantize(
    packed: Rows,
    tokens: int,
    channels: int,
    bits: int,
    widths: Any,
    levels: Any,
    out: Any,
    scratch: Any,
    begin: int,
    end: int,
) -> None:
    """One unit a row."""
    flat, head, token = packed
    slots = scratch.view(np.uint8)
    slots[:] = 0  # a word may reach beyond the last bit
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        component = h * channels
        unpack_row(flat, h * head + t * token, bits, 1, slots)
        h, t = following(h, t, tokens)
        at = 0
        for c in range(channels):
            width = widths[component + c]
            # Its highest byte gets the lowest bit of every byte, in order.
            byte = (load_word(slots, at) * _GATHER) >> _TOP
            code = np.uint32(byte) & ((np.uint32(1) << np.uint32(width)) - np.uint32(1))
            out[unit * channels + c] = levels[np.uint32(width * _CODES) + code]
            at += width
