"""What `KVCacheCompressor.compress_cache` returns: all layers of a model's cache."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from kvcompress.arrays import (
    Array,
    array_namespace,
    convert,
    device,
    itemsize,
    library_name,
    namespace_of,
    pytree,
    register_pytrees,
    to_host,
)
from kvcompress.compressed.base import Compressed, nbytes_of
from kvcompress.compressed.kv import CompressedKV
from kvcompress.methods.base import Payload

CHECKSUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class CompressedLayerGroup(Compressed):
    """Layers that were compressed together, in the library and on the device they came from.

    Not a JAX pytree: how many bytes it has depends on the data, which no compiler of arrays can
    follow.

    Attributes
    ----------
    payload : dict of str to array
        What the method needs to decode all tokens but the exact ones.
    exact : tuple of pairs of arrays ``[batch, num_heads, exact tokens, head_dim]``
        Keys and values of every layer kept as they were: sinks first, then the window.
    positions : array ``[tokens]`` or int
        Of all tokens, exact ones included; of the first, where they follow one another.
    method : str
        Identifier of the `CacheMethod`.
    fingerprint : str
        Of the parameters that it was coded with.
    shapes : tuple of pairs of shapes
        Of the original keys and values of every layer.
    dtype : str
        Of the originals.
    sinks : int
        How many of the exact tokens stand at the start.
    checksum : int
        CRC-32 of all of the above, from `compute_checksum`; 4 bytes.
    """

    payload: Payload
    exact: tuple[tuple[Array, Array], ...]
    positions: Array | int
    method: str
    fingerprint: str
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dtype: str
    sinks: int
    checksum: int = 0

    def compute_checksum(self) -> int:
        """CRC-32 of all arrays and facts: what cannot be decoded as it was encoded has another."""
        facts = self.method, self.fingerprint, self.shapes, self.dtype, self.sinks
        places = self.positions
        crc = zlib.crc32(repr((facts, places if isinstance(places, int) else None)).encode())
        arrays = [self.payload[name] for name in sorted(self.payload)]
        arrays += [x for pair in self.exact for x in pair]
        arrays += [] if isinstance(places, int) else [places]
        for x in arrays:
            host = np.ascontiguousarray(to_host(x))
            crc = zlib.crc32(f"{host.dtype} {host.shape}".encode(), crc)
            crc = zlib.crc32(host.reshape(-1).view(np.uint8).data, crc)
        return crc

    @property
    def device(self) -> Any:
        return device(self.some_array)

    @property
    def nbytes(self) -> int:
        return self.coded_nbytes + nbytes_of(x for pair in self.exact for x in pair)

    @property
    def coded_nbytes(self) -> int:
        places = () if isinstance(self.positions, int) else (self.positions,)
        return nbytes_of((*self.payload.values(), *places)) + CHECKSUM_BYTES

    @property
    def original_nbytes(self) -> int:
        return self.num_values * itemsize(self.dtype)

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for pair in self.shapes for shape in pair)

    @property
    def num_coded(self) -> int:
        exact: int = sum(math.prod(x.shape) for pair in self.exact for x in pair)
        return self.num_values - exact

    @property
    def some_array(self) -> Array:
        """One of the arrays, which tells the library and the device of all."""
        return self.exact[0][0]

    def to(self, library: Any, /, *, device: Any = None) -> Self:
        xp = namespace_of(library)

        def move(x: Array) -> Array:
            return convert(x, xp, device)

        places = self.positions
        return replace(
            self,
            payload={name: move(x) for name, x in self.payload.items()},
            exact=tuple((move(k), move(v)) for k, v in self.exact),
            positions=places if isinstance(places, int) else move(places),
        )


@pytree(data=("parts",), meta=("layers",))
@dataclass(frozen=True, eq=False)
class CompressedCache(Compressed):
    """Compressed keys and values of all layers of a cache.

    A JAX pytree whose parts are; layers that were compressed together are leaves of it, which
    ``jax.jit`` does not accept. The parameters of a `CacheMethod` belong to the model and are not
    part of what is compressed: any `KVCacheCompressor` that has them can decompress it.

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
    def device(self) -> Any:
        return self.parts[0].device if self.parts else None

    @property
    def nbytes(self) -> int:
        return self._total(lambda part: part.nbytes)

    @property
    def coded_nbytes(self) -> int:
        return self._total(lambda part: part.coded_nbytes)

    @property
    def original_nbytes(self) -> int:
        return self._total(lambda part: part.original_nbytes)

    @property
    def num_values(self) -> int:
        return self._total(lambda part: part.num_values)

    @property
    def num_coded(self) -> int:
        return self._total(lambda part: part.num_coded)

    def to(self, library: Any, /, *, device: Any = None) -> Self:
        parts = tuple(part.to(library, device=device) for part in self.parts)
        return replace(self, parts=parts)

    def __repr__(self) -> str:
        kinds = ", ".join(
            "1 layer" if len(layers) == 1 else f"{len(layers)} layers together"
            for layers in self.layers[:3]
        )
        more = f", {len(self.parts) - 3} more" if len(self.parts) > 3 else ""
        library = ""
        if self.parts:
            name = library_name(array_namespace(self.parts[0].some_array))
            library = f", {name} on {self.device}"
        return (
            f"CompressedCache({kinds}{more}{library}, {self.nbytes:,} bytes, "
            f"{self.bits_per_value:.3g} bits/value, {self.ratio:.3g}x)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled arrays may be JAX's before this process ever compressed one.
        self.__dict__.update(state)
        register_pytrees()

    def _total(self, count: Callable[[CompressedKV | CompressedLayerGroup], int]) -> int:
        return sum(map(count, self.parts))
