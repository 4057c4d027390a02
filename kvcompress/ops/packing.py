"""Codes of 1 to 16 bits, packed without gaps into bytes, and back.

A code is cut into planes whose widths are powers of two (3 bits = 2 + 1, 12 = 8 + 4), lowest bits
first. Within the plane of width w, byte j of a row of n codes holds codes j, j + m, j + 2m, ...
(m = ceil(n w / 8)), lowest first. So every step works on contiguous runs, and any row can be read
without its neighbours.
"""

from __future__ import annotations

from functools import cache

from kvcompress.arrays import Array, array_namespace, device

CODE_BITS = (2, 3, 4, 8)
"""Widths of codes for which there are kernels, and which methods offer as a choice."""


def code_dtype(bits: int) -> str:
    """Name of the dtype that unpacked codes of `bits` bits come in."""
    return "uint8" if bits <= 8 else "int32"


@cache  # what one token takes is asked many times
def packed_size(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes of `bits` bits takes."""
    return sum(_plane_size(n, width) for _, width in _planes(bits))


def pack(codes: Array, bits: int) -> Array:
    """Pack `codes` along the last axis.

    Parameters
    ----------
    codes : array ``[..., n]``, uint8 or int32
        Values in ``[0, 2**bits)``.
    bits : int
        1 to 16.

    Returns
    -------
    array ``[..., packed_size(n, bits)]``, uint8
    """
    xp = array_namespace(codes)
    *lead, n = codes.shape
    rows = []
    for shift, width in _planes(bits):
        per, size = 8 // width, _plane_size(n, width)
        plane = xp.astype((codes >> shift) & (2**width - 1), xp.uint8, copy=False)
        if per * size > n:
            padding = xp.zeros((*lead, per * size - n), dtype=xp.uint8, device=device(codes))
            plane = xp.concat([plane, padding], axis=-1)
        row = plane[..., :size]
        for i in range(1, per):
            row = row | (plane[..., i * size : (i + 1) * size] << (i * width))
        rows.append(row)
    return rows[0] if len(rows) == 1 else xp.concat(rows, axis=-1)


def unpack(packed: Array, bits: int, n: int) -> Array:
    """Undo `pack`.

    Parameters
    ----------
    packed : array ``[..., packed_size(n, bits)]``, uint8
    bits : int
        1 to 16.
    n : int
        Codes in a row.

    Returns
    -------
    array ``[..., n]``, uint8 (up to 8 bits) or int32
    """
    xp = array_namespace(packed)
    dtype = getattr(xp, code_dtype(bits))
    codes, start = None, 0
    for shift, width in _planes(bits):
        per, size = 8 // width, _plane_size(n, width)
        row = packed[..., start : start + size]
        start += size
        parts = [(row >> (i * width)) & (2**width - 1) for i in range(per)]
        plane = parts[0] if per == 1 else xp.concat(parts, axis=-1)[..., :n]
        plane = xp.astype(plane, dtype, copy=False) << shift
        codes = plane if codes is None else codes | plane
    return codes


def _planes(bits: int) -> list[tuple[int, int]]:
    """(shift, width) of every plane, lowest bits first."""
    planes, shift = [], 0
    for width in (8, 8, 4, 2, 1):
        if bits - shift >= width:
            planes.append((shift, width))
            shift += width
    return planes


def _plane_size(n: int, width: int) -> int:
    return -(-n * width // 8)
