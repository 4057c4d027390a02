"""All layers of a cache: compressed one by one or in groups, and parts of it restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvcompress.arrays import Array, HostArray
from kvcompress.compressed.cache import CompressedCache, CompressedLayerGroup
from kvcompress.compressed.kv import CompressedKV, KVLayout
from kvcompress.compressor.layer import LayerCodec
from kvcompress.compressor.layer_group import compress_group, decompress_group
from kvcompress.compressor.positions import places_of
from kvcompress.compressor.validation import (
    check_alike,
    check_cache,
    check_finite,
    positions_of,
)
from kvcompress.errors import CalibrationError, LayoutError, SettingError, UnknownLayer
from kvcompress.methods.cache_method import CacheMethod


@dataclass(frozen=True)
class CacheCodec:
    """How the layers of a cache are compressed and restored.

    Parameters
    ----------
    layer : callable
        From the number of a layer to its `LayerCodec`.
    method : CacheMethod, optional
        What codes layers together, in place of the methods of the layers.
    """

    layer: Callable[[int], LayerCodec]
    method: CacheMethod | None = None

    def compress(
        self, keys: Sequence[Array], values: Sequence[Array], positions: Array | None
    ) -> CompressedCache:
        """Compress all layers; see `KVCacheCompressor.compress_cache`."""
        check_cache(keys, values)
        places = positions_of([k.shape[2] for k in keys], positions)
        pairs = list(zip(keys, values, strict=True))
        if self.method is not None:
            return self._compress_groups(self.method, pairs, places)
        parts = []
        for i, (k, v) in enumerate(pairs):
            codec = self.layer(i)
            sinks = _sinks(codec, places[i])
            codec = codec if sinks == codec.sinks else replace(codec, sinks=sinks)
            parts.append(codec.compress(k, v, KVLayout.BATCHED, places_of(places[i])))
        return CompressedCache(tuple(parts), tuple((i,) for i in range(len(parts))))

    def _compress_groups(
        self,
        method: CacheMethod,
        pairs: Sequence[tuple[Array, Array]],
        places: Sequence[HostArray],
    ) -> CompressedCache:
        known = sorted(layer for group in method.layers for layer in group)
        if known != list(range(len(pairs))):
            raise SettingError(f"the layer groups have layers {known}, got {len(pairs)} layers")
        for group, layers in enumerate(method.layers):
            method.check(group, *zip(*(pairs[i] for i in layers), strict=True))
            check_alike([x for i in layers for x in pairs[i]])
        codec = self.layer(0)
        finite = [
            (
                check_finite(k, "keys", codec.dispatch, codec.nonfinite),
                check_finite(v, "values", codec.dispatch, codec.nonfinite),
            )
            for k, v in pairs
        ]
        parts = tuple(
            compress_group(
                method,
                group,
                [finite[i] for i in layers],
                places[layers[0]],
                sinks=_sinks(codec, places[layers[0]]),
                window=codec.window,
                dispatch=codec.dispatch,
            )
            for group, layers in enumerate(method.layers)
        )
        return CompressedCache(parts, method.layers)

    def decompress(
        self, compressed: CompressedCache, layers: Sequence[int] | None, tokens: slice | None
    ) -> tuple[list[Array], list[Array]]:
        """Restore layers in the order asked for; see `KVCacheCompressor.decompress_cache`."""
        if not isinstance(compressed, CompressedCache):
            raise LayoutError(f"expected a CompressedCache, got {type(compressed).__name__}")
        wanted = range(compressed.num_layers) if layers is None else layers
        for layer in wanted:
            if layer not in range(compressed.num_layers):
                raise UnknownLayer(f"there are {compressed.num_layers} layers, not {layer!r}")
        asked: Any = slice(None) if tokens is None else tokens
        if not isinstance(asked, slice) or asked.step not in (None, 1):
            raise SettingError(f"tokens must be a slice without steps, got {tokens!r}")
        restored: dict[int, tuple[Array, Array]] = {}
        for part, held in zip(compressed.parts, compressed.layers, strict=True):
            places = [i for i, layer in enumerate(held) if layer in set(wanted)]
            if places:
                pairs = self._restore(part, held, places, asked)
                restored |= zip([held[i] for i in places], pairs, strict=True)
        return [restored[i][0] for i in wanted], [restored[i][1] for i in wanted]

    def _restore(
        self,
        part: CompressedKV | CompressedLayerGroup,
        held: Sequence[int],
        places: Sequence[int],
        asked: slice,
    ) -> list[tuple[Array, Array]]:
        """Keys and values of some of the layers of a part."""
        codec = self.layer(held[0])
        if isinstance(part, CompressedKV):
            k, v = codec.decompress(part)
            return [(k[:, :, asked, :], v[:, :, asked, :])]
        if self.method is None or self.method.identifier != part.method:
            raise CalibrationError(
                f"this was compressed by a {part.method} with the parameters "
                f"{part.fingerprint[:12]}; decompress it with a KVCacheCompressor of that method"
            )
        return decompress_group(self.method, part, places, asked, codec.dispatch)


def _sinks(codec: LayerCodec, positions: HostArray) -> int:
    """Sinks of a layer: none where it no longer holds the first tokens."""
    return codec.sinks if not len(positions) or positions[0] == 0 else 0
