"""`KVCacheCompressor`: validate, set exact tokens aside, delegate to the methods, and join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, Protocol

from kvcompress.arrays import FLOATING, Array, array_namespace
from kvcompress.backend import Dispatcher, select
from kvcompress.compressed.cache import CompressedCache
from kvcompress.compressed.kv import CompressedKV, KVLayout
from kvcompress.compressor.cache import (
    check_layers,
    compress_layer_groups,
    decompress_layers,
    positions_of,
)
from kvcompress.compressor.tensor import decode, encode, readable, split_spec
from kvcompress.compressor.validation import check_dtypes, check_finite, check_shapes
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.errors import (
    DTypeError,
    LayoutError,
    SettingError,
    ShapeError,
    check_choice,
    check_integer,
    normalize,
)
from kvcompress.methods.base import Method, Role
from kvcompress.ops.packing import CODE_BITS


class KVCache(Protocol):
    """What the compressor asks of a cache of keys and values.

    A cache that also has ``paged_kv(seq_id, layer)``, which returns two `kvcompress.ops.Paged`, is
    compressed without being copied where method and backend can read it in place.
    """

    def get_kv(self, seq_id: Any, layer: int) -> tuple[Array, Array]:
        """Keys and values ``[num_heads, seq_len, head_dim]`` of a sequence in a layer."""

    def append(self, seq_id: Any, layer: int, k: Array, v: Array, /) -> None:
        """Append keys and values ``[num_heads, new tokens, head_dim]``, wholly or not at all."""


class LatentCache(Protocol):
    """What the compressor asks of a cache of latents (multi-head latent attention)."""

    def get_compressed_kv(self, layer: int) -> tuple[Array, Array]:
        """Latents ``[batch, seq_len, kv_lora_rank]``, RoPE keys ``[batch, seq_len, rope_dim]``."""

    def append_compressed(self, layer: int, latent: Array, rope_key: Array, /) -> None:
        """Append latents and RoPE keys of new tokens, wholly or not at all."""


@dataclass(frozen=True)
class KVCacheCompressor:
    """Compresses the keys and values of a transformer, in any library of the Array API family.

    Immutable: may be copied, pickled, hashed, used from several threads and inside ``jax.jit``.

    Parameters
    ----------
    method : Method or CrossLayerTransform
        How keys are compressed, and values where `value_method` is None. A `CrossLayerTransform` does
        both, of many layers: see `compress_cache`.
    quant_bits : {2, 3, 4, 8}
        Bits of a code for methods that do not set their own.
    value_method : Method, optional
        How values are compressed.
    sinks : int
        First tokens kept exact (attention sinks, Xiao et al. 2023, arXiv 2309.17453).
    window : int
        Last tokens kept exact.
    nonfinite : {"raise", "saturate"}
        What NaN, infinities and magnitudes above 2**120 become: an error (as far as values can be
        looked at: not under ``jax.jit``), or zero and the largest magnitude of that sign.
    backend : str or Dispatcher, optional
        "auto", "generic" or a backend's name; None asks ``KVCOMPRESS_BACKEND``, then is "auto". A
        name is looked up by every call, so a pickled compressor uses what there is where it is
        loaded. A `kvcompress.backend.Dispatcher` is used as it is, and pickled with its backends.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    method: Method | CrossLayerTransform
    quant_bits: int = 8
    _: KW_ONLY
    value_method: Method | None = None
    sinks: int = 0
    window: int = 0
    nonfinite: Literal["raise", "saturate"] = "raise"
    backend: str | Dispatcher | None = None

    def __post_init__(self) -> None:
        for name in ("method", "value_method"):
            value = getattr(self, name)
            if (
                isinstance(value, CrossLayerTransform)
                and name == "method"
                and not self.value_method
            ):
                continue
            if not isinstance(value, Method) and (name, value) != ("value_method", None):
                raise SettingError(
                    f"{name} must be a Method such as LowRank(rank=32), got {value!r}"
                )
        normalize(
            self,
            quant_bits=check_choice("quant_bits", self.quant_bits, CODE_BITS, "2, 3, 4 or 8"),
            sinks=check_integer("sinks", self.sinks, 0),
            window=check_integer("window", self.window, 0),
        )
        if self.nonfinite not in ("raise", "saturate"):
            raise SettingError(f'nonfinite must be "raise" or "saturate", got {self.nonfinite!r}')

    def compress_kv(self, k: Array, v: Array, /) -> CompressedKV:
        """Compress keys and values ``[batch, num_heads, seq_len, head_dim]``.

        Parameters
        ----------
        k, v : arrays of one library, dtype (float16, bfloat16, float32) and device
            They agree in all sizes but head_dim. They are not changed.

        Raises
        ------
        NamespaceError, ShapeError, DTypeError, NonFiniteError, SettingError
            Before anything is computed.
        """
        return self._compress(k, v, KVLayout.BATCHED, ndim=4)

    def compress_kv_3d(self, k: Array, v: Array, /) -> CompressedKV:
        """Compress keys and values ``[num_heads, seq_len, head_dim]``; see `compress_kv`."""
        return self._compress(k, v, KVLayout.UNBATCHED, ndim=3)

    def decompress_kv(self, compressed: CompressedKV, /) -> tuple[Array, Array]:
        """Restore keys and values ``[batch, num_heads, seq_len, head_dim]``.

        Returns
        -------
        k, v : arrays
            Of the shape, dtype, library and device that were compressed.

        Raises
        ------
        LayoutError
            If something else than a batch was compressed.
        """
        return self._decompress(compressed, KVLayout.BATCHED)

    def decompress_kv_3d(self, compressed: CompressedKV, /) -> tuple[Array, Array]:
        """Restore keys and values ``[num_heads, seq_len, head_dim]``; see `decompress_kv`."""
        return self._decompress(compressed, KVLayout.UNBATCHED)

    def compress_cache(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        /,
        *,
        positions: Array | None = None,
    ) -> CompressedCache:
        """Compress the keys and values of all layers of a cache.

        By a `CrossLayerTransform`, layers of a span are compressed together; by other methods, one by
        one. Layers that no longer hold the first tokens keep no sinks.

        Parameters
        ----------
        keys, values : sequences of arrays ``[batch, num_heads, seq_len, head_dim]``
            One for every layer; of one library, dtype and device. Layers may differ in sizes.
        positions : integer array ``[seq_len]``, optional
            Where the tokens stand in the text, which RoPE encodes. If left out, the layers with
            most tokens hold them from position 0 on, and others the last of them.

        Raises
        ------
        NamespaceError, ShapeError, DTypeError, NonFiniteError, SettingError
            Before anything is computed.
        """
        check_layers(keys, values)
        places = positions_of([k.shape[2] for k in keys], positions)
        sinks = [self.sinks if not len(p) or p[0] == 0 else 0 for p in places]
        if isinstance(self.method, CrossLayerTransform):
            return compress_layer_groups(
                self.method,
                keys,
                values,
                places,
                select(self.backend),
                sinks=sinks,
                window=self.window,
                nonfinite=self.nonfinite,
            )
        parts = [
            replace(self, sinks=s).compress_kv(k, v)
            for k, v, s in zip(keys, values, sinks, strict=True)
        ]
        return CompressedCache(tuple(parts), tuple((i,) for i in range(len(parts))))

    def decompress_cache(
        self,
        compressed: CompressedCache,
        /,
        *,
        layers: Sequence[int] | None = None,
        tokens: slice | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """Restore keys and values of a cache, or of a part of it.

        Parameters
        ----------
        compressed : CompressedCache
        layers : sequence of int, optional
            Only these, in this order.
        tokens : slice, optional
            Only these of the tokens of each layer, without steps. What a `CrossLayerTransform` coded is
            decoded for them alone; other methods restore whole layers.

        Returns
        -------
        keys, values : lists of arrays ``[batch, num_heads, tokens, head_dim]``

        Raises
        ------
        LayoutError
            If no cache was compressed.
        UnknownLayer
            If it has no such layer.
        CalibrationError
            If it was compressed with the code of a span that `method` has not.
        CodingError
            If what was entropy-coded is damaged.
        """
        if not isinstance(compressed, CompressedCache):
            raise LayoutError(f"expected a CompressedCache, got {type(compressed).__name__}")
        return decompress_layers(
            compressed, self.method, self.decompress_kv, layers=layers, tokens=tokens
        )

    def compress_paged_cache(self, cache: KVCache, seq_id: Any, layer: int = 0) -> CompressedKV:
        """Compress one sequence of one layer of a paged cache, which is left as it is.

        Backends with kernels for it read the cache's pools in place, by methods that need no array
        but for such operations; others work on a copy.

        Returns
        -------
        CompressedKV
            Of layout `KVLayout.UNBATCHED`.

        Raises
        ------
        UnknownSequence, UnknownLayer
            From the cache; and the errors of `compress_kv`.
        """
        read = getattr(cache, "paged_kv", cache.get_kv)
        return self.compress_kv_3d(*read(seq_id, layer))

    def decompress_to_paged_cache(
        self, compressed: CompressedKV, cache: KVCache, seq_id: Any, layer: int = 0
    ) -> None:
        """Restore keys and values and append them to a sequence of a paged cache.

        Raises
        ------
        LayoutError
            If `compressed` does not hold ``[num_heads, seq_len, head_dim]``.
        UnknownSequence, UnknownLayer, OutOfBlocks
            From the cache, which then is unchanged.
        """
        cache.append(seq_id, layer, *self.decompress_kv_3d(compressed))

    def compress_mla_cache(self, cache: LatentCache, layer: int = 0) -> CompressedKV:
        """Compress the latents and RoPE keys of one layer, without projecting them up.

        `method` compresses the RoPE keys, `value_method` the latents.

        Returns
        -------
        CompressedKV
            Of layout `KVLayout.LATENT`, RoPE keys as keys and latents as values.
        """
        latent, rope_key = cache.get_compressed_kv(layer)
        return self._compress(rope_key, latent, KVLayout.LATENT, ndim=3)

    def decompress_to_mla_cache(
        self, compressed: CompressedKV, cache: LatentCache, layer: int = 0
    ) -> None:
        """Restore latents and RoPE keys and append them to one layer.

        Raises
        ------
        LayoutError
            If `compressed` does not hold latents.
        """
        rope_key, latent = self._decompress(compressed, KVLayout.LATENT)
        cache.append_compressed(layer, latent, rope_key)

    def estimate_size(
        self,
        key_shape: tuple[int, ...],
        value_shape: tuple[int, ...] | None = None,
        *,
        dtype: str = "float16",
    ) -> int:
        """Bytes that `CompressedKV.nbytes` will be, from shapes alone.

        Parameters
        ----------
        key_shape, value_shape : tuple of int
            ``(..., seq_len, head_dim)``; the values' are the keys' if left out.
        dtype : {"float16", "bfloat16", "float32"}

        Raises
        ------
        DTypeError, ShapeError, SettingError
        """
        if dtype not in FLOATING:
            raise DTypeError(f"dtype must be one of {', '.join(FLOATING)}, got {dtype!r}")
        value_shape = key_shape if value_shape is None else value_shape
        if len(key_shape) < 2 or tuple(key_shape[:-1]) != tuple(value_shape[:-1]):
            raise ShapeError(
                "shapes must be (..., seq_len, head_dim) and agree in all sizes but the last, "
                f"got {tuple(key_shape)} and {tuple(value_shape)}"
            )
        total = 0
        shapes: tuple[tuple[Role, tuple[int, ...]], ...]
        shapes = ("keys", key_shape), ("values", value_shape)
        for role, shape in shapes:
            coded, exact = split_spec(shape, dtype, exact=self.sinks + self.window)
            encoded = self._method(role).encoded_spec(coded, role)
            total += exact.nbytes + sum(spec.nbytes for spec in encoded.values())
        return total

    def _compress(self, k: Array, v: Array, layout: KVLayout, *, ndim: int) -> CompressedKV:
        array_namespace(k, v)
        check_shapes(k, v, layout, ndim)
        dtype = check_dtypes(k, v)
        dispatch = select(self.backend)
        tensors: dict[Role, Array] = {"keys": k, "values": v}
        methods = {role: self._method(role) for role in tensors}
        for role, x in tensors.items():
            # Settings that do not fit the shape raise here, before anything is computed.
            coded, _ = split_spec(x.shape, dtype, exact=self.sinks + self.window)
            methods[role].encoded_spec(coded, role)
        read = {role: readable(x, methods[role], dispatch) for role, x in tensors.items()}
        finite = {role: check_finite(x, role, dispatch, self.nonfinite) for role, x in read.items()}
        keys, values = (
            encode(x, role, methods[role], dispatch, sinks=self.sinks, window=self.window)
            for role, x in finite.items()
        )
        sinks = min(self.sinks, k.shape[-2])
        return CompressedKV(keys, values, layout, (tuple(k.shape), tuple(v.shape)), dtype, sinks)

    def _decompress(self, compressed: CompressedKV, layout: KVLayout) -> tuple[Array, Array]:
        if not isinstance(compressed, CompressedKV):
            raise LayoutError(f"expected a CompressedKV, got {type(compressed).__name__}")
        if compressed.layout is not layout:
            raise LayoutError(
                f"this holds {compressed.layout.value}, not {layout.value}; "
                f"use {_DECOMPRESS[compressed.layout]}"
            )
        dispatch = select(self.backend)
        k, v = (
            decode(tensor, self._method(tensor.role), dispatch, shape=shape, sinks=compressed.sinks)
            for tensor, shape in zip(
                (compressed.keys, compressed.values), compressed.shape, strict=True
            )
        )
        return k, v

    def _method(self, role: Role) -> Method:
        method = self.value_method if role == "values" and self.value_method else self.method
        if isinstance(method, CrossLayerTransform):
            raise SettingError(
                "CrossLayerTransform compresses layers together: use compress_cache and decompress_cache"
            )
        return method.bind(self.quant_bits)


_DECOMPRESS = {
    KVLayout.BATCHED: "decompress_kv",
    KVLayout.UNBATCHED: "decompress_kv_3d or decompress_to_paged_cache",
    KVLayout.LATENT: "decompress_to_mla_cache",
}
