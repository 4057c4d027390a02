"""What compression returns: frozen containers that know their layout and their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from kvcompress.arrays import (
    Array,
    array_namespace,
    convert,
    device,
    dtype_name,
    itemsize,
    library_name,
    namespace_of,
    pytree,
    register_pytrees,
)
from kvcompress.methods.base import Method, Payload, Role, TensorSpec


class KVLayout(Enum):
    """How the arrays were laid out that a `CompressedKV` was made from."""

    BATCHED = "[batch, num_heads, seq_len, head_dim]"
    UNBATCHED = "[num_heads, seq_len, head_dim]"
    LATENT = "[num_heads, seq_len, width] of latents"


@pytree(data=("payload", "exact"), meta=("method", "role", "spec", "ndim"))
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
    """

    payload: Payload
    exact: Array | None
    method: Method
    role: Role
    spec: TensorSpec
    ndim: int

    @property
    def arrays(self) -> dict[str, Array]:
        """Every array held, by name."""
        return self.payload if self.exact is None else {**self.payload, "exact": self.exact}

    @property
    def coded_nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(_nbytes(a) for a in self.payload.values())

    @property
    def nbytes(self) -> int:
        """Bytes of every array held."""
        return sum(_nbytes(a) for a in self.arrays.values())

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
class CompressedKV:
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
        """Device of the arrays (None while JAX traces them)."""
        return device(self._some_array)

    @property
    def nbytes(self) -> int:
        """Bytes of every array needed to decode: codes, scales, bases, codebooks, exact tokens."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def original_nbytes(self) -> int:
        """Bytes of the original keys and values."""
        return self._num_values * itemsize(self.dtype)

    @property
    def bits_per_value(self) -> float:
        """All-in bits: ``8 * nbytes`` over the number of original values; NaN if there are none."""
        return 8 * self.nbytes / self._num_values if self._num_values else math.nan

    @property
    def coded_bits_per_value(self) -> float:
        """Bits per value without the exact tokens, as papers count; NaN if there is no other."""
        coded = self.keys.num_coded + self.values.num_coded
        nbytes = self.keys.coded_nbytes + self.values.coded_nbytes
        return 8 * nbytes / coded if coded else math.nan

    @property
    def ratio(self) -> float:
        """How many times smaller than the original: ``original_nbytes / nbytes``."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.nan

    def to(self, library: Any, /, *, device: Any = None) -> CompressedKV:
        """Move to another array library, device, or both.

        Parameters
        ----------
        library : module
            Such as ``numpy``, ``jax.numpy``, ``torch`` or ``cupy``.
        device : optional
            A device of that library; None leaves the arrays where the transfer puts them.

        Returns
        -------
        CompressedKV
            May share memory with this one (DLPack).

        Raises
        ------
        NamespaceError
            If `library` is no array library.
        DTypeError
            If the library lacks a dtype that is needed.
        """
        xp = namespace_of(library)

        def move(tensor: CompressedTensor) -> CompressedTensor:
            payload = {name: convert(a, xp, device) for name, a in tensor.payload.items()}
            exact = None if tensor.exact is None else convert(tensor.exact, xp, device)
            return replace(tensor, payload=payload, exact=exact)

        return replace(self, keys=move(self.keys), values=move(self.values))

    def __repr__(self) -> str:
        keys, values = self.keys.method, self.values.method
        methods = f"{keys}" if keys == values else f"{keys}, values {values}"
        shapes = " and ".join(str(list(s)) for s in dict.fromkeys(self.shape))
        library = library_name(array_namespace(self._some_array))
        return (
            f"CompressedKV({methods}, {shapes} {self.dtype}, {library} on {self.device}, "
            f"{self.nbytes:,} bytes, {self.bits_per_value:.3g} bits/value, {self.ratio:.3g}x)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled arrays may be JAX's before this process ever compressed one.
        self.__dict__.update(state)
        register_pytrees()

    @property
    def _num_values(self) -> int:
        return self.keys.num_values + self.values.num_values

    @property
    def _some_array(self) -> Array:
        return next(iter(self.keys.arrays.values()))


def _nbytes(x: Array) -> int:
    size: int = math.prod(x.shape)
    return size * itemsize(dtype_name(x.dtype))
