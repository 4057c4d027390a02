"""`KVCacheCompressor`: validate, set exact tokens aside, delegate to the methods, and join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol

from kvcompress.arrays import Array
from kvcompress.backend import Dispatcher, select
from kvcompress.compressed.cache import CompressedCache
from kvcompress.compressed.kv import CompressedKV, KVLayout
from kvcompress.compressor.cache import CacheCodec
from kvcompress.compressor.layer import LayerCodec
from kvcompress.compressor.positions import check_places
from kvcompress.compressor.size import Shape, cache_size, layer_size
from kvcompress.compressor.validation import check_pair
from kvcompress.errors import LayoutError, SettingError, check_choice, check_integer, normalize
from kvcompress.methods import CacheMethod, Method
from kvcompress.ops.packing import CODE_BITS


class KVCache(Protocol):
    """What the compressor asks of a cache of keys and values.

    A cache that also has ``paged_kv(layer, seq_id)``, which returns two `kvcompress.ops.Paged`, is
    compressed without being copied where method and backend can read it in place.
    """

    def get_kv(self, layer: int, seq_id: Any) -> tuple[Array, Array]:
        """Keys and values ``[num_heads, seq_len, head_dim]`` of a sequence in a layer."""

    def append(self, layer: int, seq_id: Any, k: Array, v: Array, /) -> None:
        """Append keys and values ``[num_heads, new tokens, head_dim]``, wholly or not at all."""


class LatentCache(Protocol):
    """What the compressor asks of a cache of latents (multi-head latent attention).

    A cache that also has ``paged_compressed_kv(layer, seq_id)``, which returns two
    `kvcompress.ops.Paged`, is read in place as a `KVCache` with ``paged_kv`` is.
    """

    def get_compressed_kv(self, layer: int, seq_id: Any) -> tuple[Array, Array]:
        """Latents ``[num_heads, seq_len, width]`` held as keys, and those held as values."""

    def append_compressed(self, layer: int, seq_id: Any, k: Array, v: Array, /) -> None:
        """Append latents ``[num_heads, new tokens, width]``, wholly or not at all."""


@dataclass(frozen=True)
class KVCacheCompressor:
    """Compresses the keys and values of a transformer, in any library of the Array API family.

    Immutable: may be copied, pickled, hashed, used from several threads and inside ``jax.jit``.

    Parameters
    ----------
    method : Method or CacheMethod
        How keys are compressed, and values where `value_method` is None. A `CacheMethod` such as
        `CrossLayerTransform` does both, of many layers: see `compress_cache`.
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

    method: Method | CacheMethod
    quant_bits: int = 8
    _: KW_ONLY
    value_method: Method | None = None
    sinks: int = 0
    window: int = 0
    nonfinite: Literal["raise", "saturate"] = "raise"
    backend: str | Dispatcher | None = None

    def __post_init__(self) -> None:
        method: Any = self.method
        value_method: Any = self.value_method
        if not isinstance(method, Method | CacheMethod):
            raise SettingError(f"method must be a Method such as LowRank(rank=32), got {method!r}")
        if value_method is not None and isinstance(method, CacheMethod):
            raise SettingError(
                f"value_method must be None with {method.identifier}, which codes the values too, "
                f"got {value_method!r}"
            )
        if not isinstance(value_method, Method | None):
            raise SettingError(
                f"value_method must be a Method such as LowRank(rank=32), got {value_method!r}"
            )
        normalize(
            self,
            quant_bits=check_choice("quant_bits", self.quant_bits, CODE_BITS, "2, 3, 4 or 8"),
            sinks=check_integer("sinks", self.sinks, 0),
            window=check_integer("window", self.window, 0),
        )
        if self.nonfinite not in ("raise", "saturate"):
            raise SettingError(f'nonfinite must be "raise" or "saturate", got {self.nonfinite!r}')

    def compress_kv(
        self, k: Array, v: Array, /, *, positions: Array | int | None = None
    ) -> CompressedKV:
        """Compress keys and values ``[batch, num_heads, seq_len, head_dim]``.

        Parameters
        ----------
        k, v : arrays of one library, dtype (float16, bfloat16, float32) and device
            They agree in all sizes but head_dim. They are not changed.
        positions : int or integer array ``[]`` or ``[seq_len]``, optional
            Position in the text of the first token, after which the others follow, or of every
            token; 0 if left out. At most 2**30. Only a method with a `Method.rope` uses it.

        Raises
        ------
        NamespaceError, ShapeError, DTypeError, NonFiniteError, SettingError
            Before anything is computed.
        """
        return self._compress(k, v, KVLayout.BATCHED, 4, positions)

    def compress_kv_3d(
        self, k: Array, v: Array, /, *, positions: Array | int | None = None
    ) -> CompressedKV:
        """Compress keys and values ``[num_heads, seq_len, head_dim]``; see `compress_kv`."""
        return self._compress(k, v, KVLayout.UNBATCHED, 3, positions)

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

        A `CacheMethod` compresses the layers of a group together, a `Method` one by one. Layers
        that no longer hold the first tokens keep no sinks.

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
        return self._cache_codec(select(self.backend)).compress(keys, values, positions)

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
            Only these of the tokens of each layer, without steps. A `CacheMethod` decodes
            them alone; a `Method` restores whole layers.

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
            If it was compressed with parameters that `method` does not have.
        CodingError
            If what was entropy-coded is damaged.
        """
        return self._cache_codec(select(self.backend)).decompress(compressed, layers, tokens)

    def compress_paged_cache(self, cache: KVCache, layer: int, seq_id: Any) -> CompressedKV:
        """Compress one layer of one sequence of a paged cache, which is left as it is.

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
        return self.compress_kv_3d(*read(layer, seq_id))

    def decompress_to_paged_cache(
        self, compressed: CompressedKV, cache: KVCache, layer: int, seq_id: Any
    ) -> None:
        """Restore keys and values and append them to one layer of a sequence of a paged cache.

        Raises
        ------
        LayoutError
            If `compressed` does not hold ``[num_heads, seq_len, head_dim]``.
        UnknownSequence, UnknownLayer, OutOfBlocks
            From the cache, which then is unchanged.
        """
        cache.append(layer, seq_id, *self.decompress_kv_3d(compressed))

    def compress_mla_cache(self, cache: LatentCache, layer: int, seq_id: Any) -> CompressedKV:
        """Compress the latents of one layer of one sequence, without projecting them up.

        `method` compresses what the cache holds as keys (latents of keys, or RoPE keys),
        `value_method` what it holds as values.

        Returns
        -------
        CompressedKV
            Of layout `KVLayout.LATENT`.

        Raises
        ------
        UnknownSequence, UnknownLayer
            From the cache; and the errors of `compress_kv`.
        """
        read = getattr(cache, "paged_compressed_kv", cache.get_compressed_kv)
        k, v = read(layer, seq_id)
        return self._compress(k, v, KVLayout.LATENT, 3)

    def decompress_to_mla_cache(
        self, compressed: CompressedKV, cache: LatentCache, layer: int, seq_id: Any
    ) -> None:
        """Restore latents and append them to one layer of a sequence of a cache of latents.

        Raises
        ------
        LayoutError
            If `compressed` does not hold latents.
        UnknownSequence, UnknownLayer, OutOfBlocks
            From the cache, which then is unchanged.
        """
        k, v = self._decompress(compressed, KVLayout.LATENT)
        cache.append_compressed(layer, seq_id, k, v)

    def estimate_size(
        self,
        key_shapes: Shape | Sequence[Shape],
        value_shapes: Shape | Sequence[Shape] | None = None,
        *,
        dtype: str = "float16",
    ) -> int:
        """Bytes that `nbytes` of the result will be, from shapes alone.

        Exact for a `Method`, of tokens that follow one another; an upper bound, which is seldom
        nearly met, for a `CacheMethod`.

        Parameters
        ----------
        key_shapes, value_shapes : tuple of int, or sequence of such
            ``(..., seq_len, head_dim)`` of what `compress_kv` is given, or one such shape for every
            layer that `compress_cache` is given. The values' are the keys' if left out.
        dtype : {"float16", "bfloat16", "float32"}

        Raises
        ------
        DTypeError, ShapeError, SettingError
        """
        keys: Any = key_shapes
        values: Any = key_shapes if value_shapes is None else value_shapes
        codec = self._cache_codec(Dispatcher())
        if keys and isinstance(keys[0], int):
            return layer_size(codec.layer(0), keys, values, dtype)
        return cache_size(codec, keys, values, dtype)

    def layer_codec(self, dispatch: Dispatcher) -> LayerCodec:
        """Return what codes a single layer, its operations run by `dispatch`."""
        keys = None if isinstance(self.method, CacheMethod) else self.method.bind(self.quant_bits)
        values = self.value_method.bind(self.quant_bits) if self.value_method else keys
        return LayerCodec(keys, values, self.sinks, self.window, self.nonfinite, dispatch)

    def _cache_codec(self, dispatch: Dispatcher) -> CacheCodec:
        together = self.method if isinstance(self.method, CacheMethod) else None
        codec = self.layer_codec(dispatch)
        return CacheCodec(lambda _: codec, together)

    def _compress(
        self,
        k: Array,
        v: Array,
        layout: KVLayout,
        ndim: int,
        positions: Array | int | None = None,
    ) -> CompressedKV:
        check_pair(k, v, layout, ndim)
        places = check_places(positions, k)
        return self.layer_codec(select(self.backend)).compress(k, v, layout, places)

    def _decompress(self, compressed: CompressedKV, layout: KVLayout) -> tuple[Array, Array]:
        if not isinstance(compressed, CompressedKV):
            raise LayoutError(f"expected a CompressedKV, got {type(compressed).__name__}")
        if compressed.layout is not layout:
            raise LayoutError(
                f"this holds {compressed.layout.value}, not {layout.value}; "
                f"use {_DECOMPRESS[compressed.layout]}"
            )
        return self.layer_codec(select(self.backend)).decompress(compressed)


_DECOMPRESS = {
    KVLayout.BATCHED: "decompress_kv",
    KVLayout.UNBATCHED: "decompress_kv_3d or decompress_to_paged_cache",
    KVLayout.LATENT: "decompress_to_mla_cache",
}
