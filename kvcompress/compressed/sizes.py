"""Bytes and bits of what is compressed, counted one way for tensors, layers and caches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

from kvcompress.arrays import Array, dtype_name, itemsize


class Sizes(ABC):
    """Five counts, and what follows from them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every array needed to decode: codes, scales, bases, codebooks, exact tokens."""

    @property
    @abstractmethod
    def coded_nbytes(self) -> int:
        """Bytes without those of the exact tokens."""

    @property
    @abstractmethod
    def original_nbytes(self) -> int:
        """Bytes of the original keys and values."""

    @property
    @abstractmethod
    def num_values(self) -> int:
        """Numbers in the original keys and values."""

    @property
    @abstractmethod
    def num_coded(self) -> int:
        """Those numbers that are not kept exact."""

    @property
    def bits_per_value(self) -> float:
        """All-in bits: ``8 * nbytes`` over the number of original values; NaN if there are none."""
        return 8 * self.nbytes / self.num_values if self.num_values else math.nan

    @property
    def coded_bits_per_value(self) -> float:
        """Bits per value without the exact tokens, as papers count; NaN if there is no other."""
        return 8 * self.coded_nbytes / self.num_coded if self.num_coded else math.nan

    @property
    def ratio(self) -> float:
        """How many times smaller than the original: ``original_nbytes / nbytes``."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.nan


def nbytes_of(arrays: Iterable[Array]) -> int:
    """Bytes of arrays of any library, traced ones too."""
    return sum(math.prod(x.shape) * itemsize(dtype_name(x.dtype)) for x in arrays)
