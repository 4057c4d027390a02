"""What compression returns: frozen containers that know their layout and their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Self

from kvcompress.arrays import (
    Array,
    Namespace,
    array_namespace,
    convert,
    device,
    itemsize,
    library_name,
    namespace_of,
    pytree,
    register_pytrees,
)
from kvcompress.compressed.base import Compressed, nbytes_of
from kvcompress.methods.base import Method, Payload, Role, TensorSpec


class KVLayout(Enum):
    """How the arrays were laid out that a `CompressedKV` was made from."""

    BATCHED = "[batch, num_heads, seq_len, head_dim]"
    UNBATCHED = "[num_heads, seq_len, head_dim]"
    LATENT = "[num_heads, seq_len, width] of latents"


@pytree(data=("places",), meta=("seq_len",))
@dataclass(frozen=True, eq=False)
class Positions:
    """Where the tokens of a tensor stand in their text.

    Attributes
    ----------
    places : array ``[1]`` or ``[tokens]``, int32
        Of the first token, where the others follow one another, or of every token.
    seq_len : int or None
        Length that the model rotated them for, if it matters; see `kvcompress.RoPE.apply`.
    """

    places: Array
    seq_len: int | None


@pytree(data=("payload", "exact", "positions"), meta=("method", "role", "spec", "ndim"))
@dataclass(frozen=True, eq=False)
class CompressedTensor:
    """One compressed tensor ``[heads, tokens, head_dim]``: the keys or the values.

    Attributes
    ----------
    payload : dict of str to array
        What `method` needs to decode all tokens but the exact ones.
    exact : array ``[heads, exact tokens, head_dim]`` or None
        Tokens kept as they were: sinks first, then the window.
    method : Method
    role : {"keys", "values"}
    spec : TensorSpec
        Of the tensor that `payload` decodes to.
    ndim : int
        Dimensions of the first array of `payload`; ``vmap`` and ``scan`` add some in front.
    positions : Positions or None
        Of the tokens that `payload` stands for, if `method` has a `Method.rope`.
    """

    payload: Payload
    exact: Array | None
    method: Method
    role: Role
    spec: TensorSpec
    ndim: int
    positions: Positions | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """Every array held, by name."""
        coded = self._coded
        return coded if self.exact is None else {**coded, "exact": self.exact}

    @property
    def _coded(self) -> dict[str, Array]:
        if self.positions is None:
            return self.payload
        return {**self.payload, "positions": self.positions.places}

    def moved(self, xp: Namespace, device: Any) -> CompressedTensor:
        """Return the tensor in another namespace, or on another device of it."""
        payload = {name: convert(a, xp, device) for name, a in self.payload.items()}
        exact = None if self.exact is None else convert(self.exact, xp, device)
        positions = self.positions
        if positions is not None:
            positions = replace(positions, places=convert(positions.places, xp, device))
        return replace(self, payload=payload, exact=exact, positions=positions)

    @property
    def coded_nbytes(self) -> int:
        """Bytes of the payload and of positions."""
        return nbytes_of(self._coded.values())

    @property
    def nbytes(self) -> int:
        """Bytes of every array held."""
        return nbytes_of(self.arrays.values())

    @property
    def num_values(self) -> int:
        """Numbers in the original tensor, exact tokens included."""
        return self.num_coded + (0 if self.exact is None else math.prod(self.exact.shape))

    @property
    def num_coded(self) -> int:
        """Numbers that the payload stands for."""
        first = next(iter(self.payload.values()))
        stacked: tuple[int, ...] = first.shape[: first.ndim - self.ndim]
        return math.prod(stacked) * self.spec.size


@pytree(data=("keys", "values"), meta=("layout", "shape", "dtype", "sinks"))
@dataclass(frozen=True, eq=False)
class CompressedKV(Compressed):
    """Compressed keys and values, in the library and on the device they came from.

    A JAX pytree: arrays are leaves, all else is static. Holds all that decoding needs; any
    `KVCacheCompressor` can decompress it.

    Attributes
    ----------
    keys, values : CompressedTensor
    layout : KVLayout
    shape : tuple of two shapes
        Of the original keys and values.
    dtype : str
        Of the originals: "float16", "bfloat16" or "float32".
    sinks : int
        How many of the exact tokens stand at the start; the others stand at the end.
    """

    keys: CompressedTensor
    values: CompressedTensor
    layout: KVLayout
    shape: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: str
    sinks: int

    @property
    def device(self) -> Any:
        return device(self.some_array)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def coded_nbytes(self) -> int:
        return self.keys.coded_nbytes + self.values.coded_nbytes

    @property
    def original_nbytes(self) -> int:
        return self.num_values * itemsize(self.dtype)

    @property
    def num_values(self) -> int:
        return self.keys.num_values + self.values.num_values

    @property
    def num_coded(self) -> int:
        return self.keys.num_coded + self.values.num_coded

    def to(self, library: Any, /, *, device: Any = None) -> Self:
        xp = namespace_of(library)
        return replace(self, keys=self.keys.moved(xp, device), values=self.values.moved(xp, device))

    def __repr__(self) -> str:
        keys, values = self.keys.method, self.values.method
        methods = f"{keys}" if keys == values else f"{keys}, values {values}"
        shapes = " and ".join(str(list(s)) for s in dict.fromkeys(self.shape))
        library = library_name(array_namespace(self.some_array))
        return (
            f"CompressedKV({methods}, {shapes} {self.dtype}, {library} on {self.device}, "
            f"{self.nbytes:,} bytes, {self.bits_per_value:.3g} bits/value, {self.ratio:.3g}x)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled arrays may be JAX's before this process ever compressed one.
        self.__dict__.update(state)
        register_pytrees()

    @property
    def some_array(self) -> Array:
        """One of the arrays, which tells the library and the device of all."""
        return next(iter(self.keys.arrays.values()))
