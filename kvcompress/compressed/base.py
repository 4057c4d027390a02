"""What layers and caches have in common once compressed: bytes, bits, a device, a way to move."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Self

from kvcompress.arrays import Array, dtype_name, itemsize


class Compressed(ABC):
    """Compressed keys and values, in the library and on the device they came from."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """Device of the arrays; None while JAX traces them, or if there are none."""

    @abstractmethod
    def to(self, library: Any, /, *, device: Any = None) -> Self:
        """Move to another array library, device, or both.

        Parameters
        ----------
        library : module
            Such as ``numpy``, ``jax.numpy``, ``torch`` or ``cupy``.
        device : optional
            A device of that library; None leaves the arrays where the transfer puts them.

        Returns
        -------
        Of the same type
            It may share memory with this one (DLPack).

        Raises
        ------
        NamespaceError
            If `library` is not an array library.
        DTypeError
            If the library lacks a dtype that is needed.
        """

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
