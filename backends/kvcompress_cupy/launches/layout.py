"""How a kernel is launched, and how the arrays lie that it works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARED = 48 * 1024
"""Bytes of shared memory that every GPU gives a block without being asked."""

CHANNELS = 2**15
"""Most channels of a row: `reciprocal` is exact up to there."""

STRIDE = 2**31 - 1
"""Most elements from a token to the next: kernels multiply 32 bits by 32."""

THREADS = 256
"""Threads of a block, where a kernel leaves the choice."""

TURNS = 4
"""Tiles at most that a block takes one after the other."""

MANY = 1024
"""Blocks that keep a GPU busy: as long as there are no more, each has one tile."""

TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
"""`enum Type` of the kernels."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, but for its arrays, which come before `scalars`."""

    family: str
    name: str
    grid: int
    block: int
    shared: int
    scalars: tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of neighbouring channels: `heads` times `tokens`, strides in elements.

    Those that are `paged` follow each other as slots say, the same for all heads.
    """

    heads: int
    tokens: int
    channels: int
    head_stride: int
    token_stride: int
    paged: bool = False

    def flat(self) -> Rows:
        """Return the same rows as those of one head, where their stride is uniform."""
        if self.paged:
            return self
        if self.heads > 1 and self.tokens > 1:
            if self.head_stride != self.tokens * self.token_stride:
                return self
            stride = self.token_stride
        else:
            stride = self.token_stride if self.heads == 1 else self.head_stride
        if abs(stride) > STRIDE:
            return self
        return Rows(1, self.heads * self.tokens, self.channels, 0, stride)

    def aligned(self, pointer: int, itemsize: int, to: int = 16) -> bool:
        """Whether all rows begin and end at multiples of `to` bytes."""
        strides = self.token_stride, self.head_stride
        offsets = (pointer, self.channels * itemsize, *(s * itemsize for s in strides))
        return all(offset % to == 0 for offset in offsets)


def turns(tiles: int) -> int:
    """Tiles that a block takes one after the other, preparing itself once: the more there are."""
    return max(1, min(TURNS, tiles // MANY))


def rows(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Rows | None:
    """Lay ``[..., tokens, channels]`` out as `Rows`; None where only a copy can.

    Parameters
    ----------
    shape, strides : sequences of int
        Strides in bytes.
    itemsize : int
    """
    *lead, tokens, channels = shape
    if any(stride % itemsize for stride in strides):
        return None
    *steps, token_stride, channel_stride = (stride // itemsize for stride in strides)
    if (channels > 1 and channel_stride != 1) or abs(token_stride) > STRIDE:
        return None
    heads, head_stride = 1, 0
    for size, step in zip(reversed(lead), reversed(steps), strict=True):
        if size == 1:
            continue
        if heads == 1:
            heads, head_stride = size, step
        elif step == heads * head_stride:
            heads *= size
        else:
            return None
    return Rows(heads, tokens, channels, head_stride, token_stride if tokens > 1 else 0)


def contiguous_rows(shape: Sequence[int]) -> Rows:
    """Lay an array in C order out."""
    *lead, tokens, channels = shape
    return Rows(math.prod(lead), tokens, channels, tokens * channels, channels)


def reciprocal(divisor: int) -> np.uint32:
    """Return what `divide` of the kernels takes for a divisor."""
    return np.uint32(-(-(2**31) // divisor))
