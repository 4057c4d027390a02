"""What `KVCacheCompressor.compress_cache` returns: all layers of a model's cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcompress.arrays import Array, dtype_name, itemsize
from kvcompress.compressed.kv import CompressedKV
from kvcompress.methods.base import Payload


@dataclass(frozen=True, eq=False)
class CompressedLayerGroup:
    """Layers that were compressed together, in the library and on the device they came from.

    No pytree: how many bytes it has depends on the data, which no compiler of arrays can follow.

    Attributes
    ----------
    payload : dict of str to array, uint8
        Entropy-coded tokens.
    exact : tuple of pairs of arrays ``[batch, num_heads, exact tokens, head_dim]``
        Keys and values of every layer kept as they were: sinks first, then the window.
    positions : array ``[tokens]`` or int
        Of all tokens, exact ones included; of the first, where they follow one another.
    fingerprint : str
        Of the `CrossLayerParameters` that decodes it.
    shapes : tuple of pairs of shapes
        Of the original keys and values of every layer.
    dtype : str
        Of the originals.
    sinks : int
        How many of the exact tokens stand at the start.
    """

    payload: Payload
    exact: tuple[tuple[Array, Array], ...]
    positions: Array | int
    fingerprint: str
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dtype: str
    sinks: int

    @property
    def coded_nbytes(self) -> int:
        """Bytes of the payload, and of positions that are not just a range."""
        arrays = list(self.payload.values())
        if not isinstance(self.positions, int):
            arrays.append(self.positions)
        return sum(_nbytes(x) for x in arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of every array held."""
        return self.coded_nbytes + sum(_nbytes(x) for pair in self.exact for x in pair)

    @property
    def num_values(self) -> int:
        """Keys and values of the originals."""
        return sum(math.prod(shape) for pair in self.shapes for shape in pair)

    @property
    def num_coded(self) -> int:
        """Those that the payload stands for."""
        exact: int = sum(math.prod(x.shape) for pair in self.exact for x in pair)
        return self.num_values - exact


@dataclass(frozen=True, eq=False)
class CompressedCache:
    """Compressed keys and values of all layers of a cache.

    Any `KVCacheCompressor` can decompress it that has the codes it was compressed with, if any.

    Attributes
    ----------
    parts : tuple of CompressedKV and CompressedLayerGroup
        Single layers, or layers compressed together.
    layers : tuple of tuples of int
        Indices, among the layers that were compressed, of those in each part.
    """

    parts: tuple[CompressedKV | CompressedLayerGroup, ...]
    layers: tuple[tuple[int, ...], ...]

    @property
    def num_layers(self) -> int:
        """Layers held."""
        return sum(map(len, self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of every array needed to decode, but for the codes of spans."""
        return sum(part.nbytes for part in self.parts)

    @property
    def original_nbytes(self) -> int:
        """Bytes of the original keys and values."""
        return sum(
            part.original_nbytes
            if isinstance(part, CompressedKV)
            else part.num_values * itemsize(part.dtype)
            for part in self.parts
        )

    @property
    def num_values(self) -> int:
        """Keys and values of the originals."""
        return sum(
            part.keys.num_values + part.values.num_values
            if isinstance(part, CompressedKV)
            else part.num_values
            for part in self.parts
        )

    @property
    def num_coded(self) -> int:
        """Those that are not kept exact."""
        return sum(
            part.keys.num_coded + part.values.num_coded
            if isinstance(part, CompressedKV)
            else part.num_coded
            for part in self.parts
        )

    @property
    def coded_nbytes(self) -> int:
        """Bytes without the exact tokens."""
        return sum(
            part.keys.coded_nbytes + part.values.coded_nbytes
            if isinstance(part, CompressedKV)
            else part.coded_nbytes
            for part in self.parts
        )

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

    def __repr__(self) -> str:
        kinds = ", ".join(
            f"{len(layers)} layers together"
            if isinstance(part, CompressedLayerGroup)
            else "1 layer"
            for part, layers in zip(self.parts[:3], self.layers, strict=False)
        )
        more = f", {len(self.parts) - 3} more" if len(self.parts) > 3 else ""
        return (
            f"CompressedCache({kinds}{more}, {self.nbytes:,} bytes, "
            f"{self.bits_per_value:.3g} bits/value, {self.ratio:.3g}x)"
        )


def _nbytes(x: Array) -> int:
    size: int = math.prod(x.shape)
    return size * itemsize(dtype_name(x.dtype))
