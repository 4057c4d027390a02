"""Vector quantization: k-means codebooks on head vectors or on sub-vectors of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from kvcompress.arrays import Array, array_namespace, astype, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.errors import SettingError, check_fraction, check_integer, normalize
from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.kmeans import kmeans, lookup, nearest
from kvcompress.ops.outliers import gather_rows, largest, put_rows
from kvcompress.ops.packing import code_dtype, pack, packed_size, unpack
from kvcompress.ops.pca import center


@dataclass(frozen=True)
class VectorQuantization(Method):
    """Code every sub-vector by the nearest centroid of a codebook trained on the tensor itself.

    Product quantization (Jegou et al. 2011, doi 10.1109/TPAMI.2010.57): the head vector is cut into
    ``head_dim / vector_dim`` sub-vectors. All of them, of all heads, share one codebook, and so
    its bytes. The tokens it serves worst are kept exact.

    Parameters
    ----------
    codebook_size : int
        Centroids, 2 to 65536; a code takes ``ceil(log2(codebook_size))`` bits.
    vector_dim : int or None
        Length of a sub-vector, a divisor of head_dim; None: the whole head vector.
    exact : float
        Share of the tokens of every head kept exact, in [0, 1].
    iterations : int
        Rounds of k-means.
    seed : int
        Of the first centroids and the training sample; the same seed gives the same codes.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    identifier = "VectorQuantization"

    codebook_size: int
    vector_dim: int | None = None
    exact: float = 0.01
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        dim = self.vector_dim
        normalize(
            self,
            codebook_size=check_integer("codebook_size", self.codebook_size, 2, 2**16),
            vector_dim=None if dim is None else check_integer("vector_dim", dim, 1),
            exact=check_fraction("exact", self.exact),
            iterations=check_integer("iterations", self.iterations, 0),
            seed=check_integer("seed", self.seed, 0),
        )

    @classmethod
    def presets(cls, head_dims: Collection[int], /) -> tuple[Self, ...]:
        divisor = math.gcd(*head_dims)
        settings = ((8, 16), (8, 64), (4, 16), (4, 64), (2, 16), (4, 256), (2, 64))
        return tuple(dict.fromkeys(cls(size, math.gcd(dim, divisor)) for dim, size in settings))

    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        heads, tokens, head_dim = spec.shape
        dim, kept = self._dim(head_dim), self._kept(tokens)
        code_bytes = packed_size(head_dim // dim, self._bits)
        return {
            "codes": TensorSpec((heads, tokens, code_bytes), "uint8"),
            "codebook": TensorSpec((self.codebook_size, dim), spec.dtype),
            "mean": TensorSpec((heads, 1, head_dim), spec.dtype),
            "scale": TensorSpec((heads, 1, 1), "float32"),
            "exact_index": TensorSpec((heads, kept), "int32", tokens),
            "exact_value": TensorSpec((heads, kept, head_dim), spec.dtype),
        }

    def encode(self, x: Array, role: Role, dispatch: Dispatcher) -> Payload:
        xp, dtype = array_namespace(x), dtype_name(x.dtype)
        heads, tokens, head_dim = x.shape
        centered, mean, scale = center(dispatch(cast, x, dtype="float32"), dtype=dtype)
        dim = self._dim(head_dim)
        places = head_dim // dim
        vectors = xp.reshape(centered, (heads * tokens * places, dim))
        codebook = kmeans(vectors, self.codebook_size, iterations=self.iterations, seed=self.seed)
        codebook = astype(codebook, dtype)
        codes = dispatch(nearest, vectors, astype(codebook, "float32"))
        error = xp.reshape(vectors - dispatch(lookup, codes, astype(codebook, "float32")), x.shape)
        index = largest(xp.sum(error * error, axis=-1), self._kept(tokens))
        return {
            "codes": pack(xp.reshape(codes, (heads, tokens, places)), self._bits),
            "codebook": codebook,
            "mean": mean,
            "scale": scale,
            "exact_index": index,
            "exact_value": gather_rows(x, index),
        }

    def decode(self, payload: Payload, spec: TensorSpec, role: Role, dispatch: Dispatcher) -> Array:
        xp = array_namespace(*payload.values())
        heads, tokens, head_dim = spec.shape
        places = head_dim // self._dim(head_dim)
        codes = unpack(payload["codes"], self._bits, places)
        codes = xp.reshape(codes, (heads * tokens * places,))
        if self.codebook_size < 2**self._bits:
            TensorSpec(codes.shape, code_dtype(self._bits), self.codebook_size).check(
                "codes", codes
            )
        vectors = dispatch(lookup, codes, astype(payload["codebook"], "float32"))
        x = xp.reshape(vectors, spec.shape)
        x += astype(payload["mean"], "float32")
        x *= payload["scale"]
        exact = astype(payload["exact_value"], "float32")
        return put_rows(x, payload["exact_index"], exact, overwrite=True)

    @property
    def _bits(self) -> int:
        return (self.codebook_size - 1).bit_length()

    def _dim(self, head_dim: int) -> int:
        dim = self.vector_dim or head_dim
        if head_dim % dim:
            accepted = ", ".join(str(d) for d in range(1, head_dim + 1) if head_dim % d == 0)
            raise SettingError(
                f"vector_dim must divide head_dim = {head_dim} ({accepted}), got {dim}"
            )
        return dim

    def _kept(self, tokens: int) -> int:
        return math.ceil(self.exact * tokens)
