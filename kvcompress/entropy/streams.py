"""Words of many lanes as arrays of a payload, and rows as lanes that are coded side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.errors import CodingError

LANES = 32
"""Parts of a row that are coded side by side, where it is coded number by number."""

NOTHING = np.zeros(0, np.uint16), np.zeros(0, np.int64)
"""Words and lengths of no lanes."""


def pack(words: HostArray, lengths: HostArray, prefix: str = "") -> dict[str, HostArray]:
    """Arrays of a payload that hold the words of lanes, one after the other."""
    width = "<u2" if int(lengths.max(initial=0)) < 1 << 16 else "<u4"
    sizes = lengths.astype(width).view(np.uint8).reshape(len(lengths), np.dtype(width).itemsize)
    return {f"{prefix}lengths": sizes, f"{prefix}words": words.astype("<u2").view(np.uint8)}


def unpack(host: Mapping[str, HostArray], prefix: str = "") -> tuple[HostArray, HostArray]:
    """Undo `pack`: words, and how many each lane has."""
    sizes, packed = host[f"{prefix}lengths"], host[f"{prefix}words"]
    width = sizes.shape[-1]
    if width not in (2, 4) or packed.size % 2:
        raise CodingError(
            "lengths and words of a payload have impossible sizes; the payload is damaged"
        )
    lengths = np.ascontiguousarray(sizes).view(f"<u{width}")[:, 0].astype(np.int64)
    words = np.ascontiguousarray(packed).view("<u2")
    if int(lengths.sum()) != words.size:
        raise CodingError(
            f"lengths of lanes do not sum to the {words.size} words; the payload is damaged"
        )
    return words, lengths


def to_lanes(rows: HostArray) -> HostArray:
    """Whole numbers ``[rows, width]`` as int32 ``[steps, rows * LANES]``."""
    count, width = rows.shape
    padded = np.pad(rows, ((0, 0), (0, -width % LANES)))
    return np.ascontiguousarray(padded.reshape(count * LANES, -1).T, np.int32)


def from_lanes(lanes: HostArray, width: int) -> HostArray:
    """Undo `to_lanes`."""
    return np.ascontiguousarray(lanes.T).reshape(-1, len(lanes) * LANES)[:, :width]
