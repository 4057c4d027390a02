"""Rows of codes into packed bytes and back; the layout is that of `kvcompress.ops.packing`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import inline
from kvcompress_numba.vectors import field, load_bytes, store_bytes


@inline
def one_plane(n: int, bits: int) -> bool:
    """Tell whether codes are packed in a single plane of whole vectors."""
    return bits & (bits - 1) == 0 and n * bits % (8 * LANES) == 0


@inline
def pack_row(codes: Any, n: int, bits: int, packed: Any, at: int) -> None:
    """Pack ``codes[:n]`` to ``packed[at:]``; `codes` has 8 more places, which are overwritten."""
    codes[n : n + 8] = 0
    shift = 0
    for log in (3, 2, 1, 0):
        width = 1 << log
        if bits - shift >= width:
            per, size = 8 >> log, (n * width + 7) >> 3
            mask = (1 << width) - 1
            whole = size & -LANES
            for j in range(0, whole, LANES):
                byte = field(load_bytes(codes, j), shift, mask, 0)
                for i in range(1, per):
                    byte = byte | field(load_bytes(codes, i * size + j), shift, mask, i * width)
                store_bytes(packed, at + j, byte)
            for j in range(whole, size):
                last = np.int64(0)
                for i in range(per):
                    last |= ((np.int64(codes[i * size + j]) >> shift) & mask) << (i * width)
                packed[at + j] = last
            at += size
            shift += width


@inline
def unpack_row(packed: Any, at: int, n: int, bits: int, codes: Any) -> None:
    """Unpack ``packed[at:]`` to ``codes[:n]``; `codes` has 8 more places, which are overwritten."""
    shift = 0
    for log in (3, 2, 1, 0):
        width = 1 << log
        if bits - shift >= width:
            per, size = 8 >> log, (n * width + 7) >> 3
            mask = (1 << width) - 1
            whole = size & -LANES
            for i in range(per):
                start = i * size
                for j in range(0, whole, LANES):
                    part = field(load_bytes(packed, at + j), i * width, mask, shift)
                    if shift:
                        part = part | load_bytes(codes, start + j)
                    store_bytes(codes, start + j, part)
                for j in range(whole, size):
                    code = ((np.int64(packed[at + j]) >> (i * width)) & mask) << shift
                    codes[start + j] = code | codes[start + j] if shift else code
            at += size
            shift += width
