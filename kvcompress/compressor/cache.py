"""All layers of a cache: what is asked of them, where their tokens stand, and parts restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, dtype_name, to_host
from kvcompress.backend import Dispatcher
from kvcompress.compressed.cache import CompressedCache
from kvcompress.compressed.kv import CompressedKV, KVLayout
from kvcompress.compressor.layer_group import check_alike, compress_group, decompress_group
from kvcompress.compressor.validation import check_dtypes, check_finite, check_shapes
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.errors import CalibrationError, DTypeError, SettingError, ShapeError, UnknownLayer
from kvcompress.methods.base import Method


def check_layers(keys: Sequence[Array], values: Sequence[Array]) -> None:
    """Raise an error unless keys and values fit each other, layer by layer."""
    if len(keys) != len(values):
        raise ShapeError(f"got keys of {len(keys)} layers and values of {len(values)}")
    for k, v in zip(keys, values, strict=True):
        array_namespace(k, v)
        check_shapes(k, v, KVLayout.BATCHED, 4)
        check_dtypes(k, v)


def positions_of(counts: Sequence[int], positions: Array | None) -> list[HostArray]:
    """Positions of the tokens of every layer, on the host.

    Without `positions`, the layer with most tokens holds all of them from the first on, and others,
    of a sliding window, the last ones.

    Raises
    ------
    DTypeError, ShapeError
        If `positions` are no integers, or not one for every token.
    """
    if positions is None:
        most = max(counts, default=0)
        return [np.arange(most - count, most) for count in counts]
    xp = array_namespace(positions)
    if not xp.isdtype(positions.dtype, "integral"):
        raise DTypeError(f"positions must be integers, got {dtype_name(positions.dtype)}")
    for count in counts:
        if tuple(positions.shape) != (count,):
            raise ShapeError(
                f"positions must be [{count}], one for every token of every layer, "
                f"got shape {tuple(positions.shape)}"
            )
    return [to_host(positions)] * len(counts)


def compress_layer_groups(
    method: CrossLayerTransform,
    keys: Sequence[Array],
    values: Sequence[Array],
    positions: Sequence[HostArray],
    dispatch: Dispatcher,
    *,
    sinks: Sequence[int],
    window: int,
    nonfinite: str,
) -> CompressedCache:
    """Compress the layers of every span together.

    Parameters
    ----------
    method : CrossLayerTransform
    keys, values : sequences of arrays ``[batch, num_heads, tokens, head_dim]``
        Of all layers, checked.
    positions : sequence of integer arrays ``[tokens]``
    dispatch : Dispatcher
    sinks : sequence of int
    window : int
    nonfinite : {"raise", "saturate"}
    """
    known = sorted(layer for code in method.groups for layer in code.group.layers)
    if known != list(range(len(keys))):
        raise SettingError(f"the spans have layers {known}, got {len(keys)} layers")
    layers = tuple(code.group.layers for code in method.groups)
    for code, held in zip(method.groups, layers, strict=True):
        code.group.check([keys[i] for i in held], [values[i] for i in held])
        check_alike([x[i] for i in held for x in (keys, values)])
    ks = [check_finite(k, "keys", dispatch, nonfinite) for k in keys]
    vs = [check_finite(v, "values", dispatch, nonfinite) for v in values]
    spans = [
        compress_group(
            code,
            [ks[i] for i in held],
            [vs[i] for i in held],
            positions[held[0]],
            sinks=sinks[held[0]],
            window=window,
        )
        for code, held in zip(method.groups, layers, strict=True)
    ]
    return CompressedCache(tuple(spans), layers)


def decompress_layers(
    compressed: CompressedCache,
    method: Method | CrossLayerTransform,
    decompress_layer: Callable[[CompressedKV], tuple[Array, Array]],
    *,
    layers: Sequence[int] | None,
    tokens: slice | None,
) -> tuple[list[Array], list[Array]]:
    """Restore layers in the order they are asked for; see `KVCacheCompressor.decompress_cache`.

    `method` has the codes of spans; `decompress_layer` restores what was compressed by itself.
    """
    wanted = range(compressed.num_layers) if layers is None else layers
    for layer in wanted:
        if layer not in range(compressed.num_layers):
            raise UnknownLayer(f"there are {compressed.num_layers} layers, not {layer!r}")
    cut = slice(None) if tokens is None else tokens
    if cut.step not in (None, 1):
        raise SettingError(f"tokens must be a slice without steps, got {cut}")
    restored: dict[int, tuple[Array, Array]] = {}
    for part, held in zip(compressed.parts, compressed.layers, strict=True):
        places = [i for i, layer in enumerate(held) if layer in set(wanted)]
        if not places:
            continue
        if isinstance(part, CompressedKV):
            k, v = decompress_layer(part)
            restored[held[0]] = k[:, :, cut, :], v[:, :, cut, :]
            continue
        if not isinstance(method, CrossLayerTransform):
            raise CalibrationError(
                f"this was compressed with the span code {part.fingerprint[:12]}; decompress "
                "it with a KVCacheCompressor whose method is a CrossLayerTransform with that code"
            )
        pairs = decompress_group(part, method.find(part.fingerprint), places, cut)
        restored |= zip([held[i] for i in places], pairs, strict=True)
    return [restored[i][0] for i in wanted], [restored[i][1] for i in wanted]
