"""What a method for whole caches is: layers that hold the same tokens are coded together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, ClassVar, Self

from kvcompress.arrays import Array
from kvcompress.backend import Dispatcher
from kvcompress.errors import CalibrationError
from kvcompress.methods.base import Payload
from kvcompress.methods.registry import known, register


class CacheMethod(ABC):
    """What `Method` is for a tensor, for the layers of a group: immutable, hashable settings.

    A layer group is layers whose caches hold the same tokens. The method has parameters for each of
    the groups of a model, which are numbered here from 0 and told apart by their fingerprints. It
    runs eagerly: the size of what it makes may follow from the data.
    """

    identifier: ClassVar[str]
    """What names the method in JSON and in files, for ever; the class may be renamed."""

    rates: ClassVar[tuple[float, float]]
    """Least and most bits per value that it is meant for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "identifier" in cls.__dict__:
            register(cls)

    @property
    @abstractmethod
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the layers of every group."""

    @property
    @abstractmethod
    def fingerprints(self) -> tuple[str, ...]:
        """SHA-256 of the parameters of every group, in hexadecimal."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all parameters, which belong to the model and are no part of what is coded."""

    @property
    @abstractmethod
    def num_values(self) -> int:
        """Keys and values of a token in all layers."""

    @abstractmethod
    def check(self, group: int, keys: Sequence[Array], values: Sequence[Array]) -> None:
        """Check that keys and values ``[batch, heads, tokens, head_dim]`` are those of a group.

        Raises
        ------
        ShapeError, DTypeError
        """

    @abstractmethod
    def max_nbytes(self, group: int, batch: int, tokens: int) -> int:
        """Bytes that the payload of so many tokens of every sequence has at most."""

    @abstractmethod
    def encode(
        self,
        group: int,
        keys: Sequence[Array],
        values: Sequence[Array],
        positions: Array,
        *,
        seq_len: int,
        dispatch: Dispatcher,
    ) -> Payload:
        """Compress the layers of a group.

        Parameters
        ----------
        group : int
        keys, values : sequences of arrays ``[batch, heads, tokens, head_dim]``
            Those that `check` has passed.
        positions : array ``[tokens]``, int32
            Where the tokens stand in the text.
        seq_len : int
            Length of that text, which some embeddings depend on; see `RoPE.apply`.
        dispatch : Dispatcher
        """

    @abstractmethod
    def decode(
        self,
        group: int,
        payload: Payload,
        positions: Array,
        *,
        batch: int,
        tokens: range,
        layers: Sequence[int],
        seq_len: int,
        dispatch: Dispatcher,
    ) -> Iterator[tuple[int, list[tuple[Array, Array]]]]:
        """Restore some tokens of some layers of a group, block by block.

        Parameters
        ----------
        group : int
        payload : dict of str to array
        positions : array ``[coded tokens]``, int32
            Of all tokens that were encoded.
        batch : int
            Sequences that were encoded.
        tokens : range
            Numbers of the tokens to restore, in steps of 1, among those encoded.
        layers : sequence of int
            Layers to restore, counted within the group.
        seq_len : int
        dispatch : Dispatcher

        Yields
        ------
        sequence : int
            Number of a sequence of the batch; all blocks of one come before those of the next.
        pairs : list of keys and values ``[1, heads, block, head_dim]``, float32
            For each of `layers`.

        Raises
        ------
        CodingError
            If the payload is damaged.
        """

    @abstractmethod
    def save(self, path: str | PathLike[str], /) -> None:
        """Write a safetensors file of all parameters."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | PathLike[str], /) -> Self:
        """Read a file that `save` wrote.

        Raises
        ------
        CalibrationError
            If it is not such a file.
        """

    def find(self, fingerprint: str) -> int:
        """Return the number of the group whose parameters have a fingerprint.

        Raises
        ------
        CalibrationError
            If there is none.
        """
        if fingerprint in self.fingerprints:
            return self.fingerprints.index(fingerprint)
        names = ", ".join(known[:12] for known in self.fingerprints)
        raise CalibrationError(
            f"this was compressed with the parameters {fingerprint[:12]}, which are not among "
            f"those of this {self.identifier}: {names}"
        )


def known_cache_methods() -> dict[str, type[CacheMethod]]:
    """Return every registered `CacheMethod` by its identifier, those of entry points included."""
    return known(CacheMethod)
