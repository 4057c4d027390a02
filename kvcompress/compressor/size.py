"""How many bytes something will take once it is compressed, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from kvcompress.arrays import FLOATING, itemsize
from kvcompress.compressed.cache import CHECKSUM_BYTES
from kvcompress.compressor.cache import CacheCodec
from kvcompress.compressor.layer import LayerCodec
from kvcompress.compressor.tensor import split_spec
from kvcompress.errors import DTypeError, SettingError, ShapeError
from kvcompress.methods.base import Role

Shape: TypeAlias = tuple[int, ...]


def layer_size(codec: LayerCodec, key_shape: Shape, value_shape: Shape, dtype: str) -> int:
    """Bytes that `CompressedKV.nbytes` of one layer will be.

    Raises
    ------
    DTypeError, ShapeError, SettingError
    """
    _check(key_shape, value_shape, dtype)
    total = 0
    parts: tuple[tuple[Role, Shape], ...] = ("keys", key_shape), ("values", value_shape)
    for role, shape in parts:
        method = codec.keys if role == "keys" else codec.values
        if method is None:
            raise SettingError(
                "a CacheMethod compresses layers together: give one shape for every layer"
            )
        coded, exact = split_spec(shape, dtype, exact=codec.sinks + codec.window)
        encoded = method.encoded_spec(coded, role)
        if role == "keys" and method.rope is not None:
            total += itemsize("int32")  # position of the first
        total += exact.nbytes + sum(spec.nbytes for spec in encoded.values())
    return total


def cache_size(
    codec: CacheCodec, key_shapes: Sequence[Shape], value_shapes: Sequence[Shape], dtype: str
) -> int:
    """Bytes that `CompressedCache.nbytes` will be, or will be at most by a `CacheMethod`.

    Raises
    ------
    DTypeError, ShapeError, SettingError
    """
    pairs = list(zip(key_shapes, value_shapes, strict=False))
    if len(key_shapes) != len(value_shapes):
        raise ShapeError(f"got keys of {len(key_shapes)} layers and values of {len(value_shapes)}")
    method = codec.method
    if method is None:
        return sum(layer_size(codec.layer(i), *pair, dtype) for i, pair in enumerate(pairs))
    known = sorted(layer for group in method.layers for layer in group)
    if known != list(range(len(pairs))):
        raise SettingError(f"the layer groups have layers {known}, got {len(pairs)} shapes")
    total, layer = 0, codec.layer(0)
    for group, layers in enumerate(method.layers):
        for i in layers:
            _check(*pairs[i], dtype)
        *lead, _, tokens, _ = pairs[layers[0]][0]
        exact = min(tokens, layer.sinks + layer.window)
        kept = sum(math.prod(shape) // max(tokens, 1) * exact for i in layers for shape in pairs[i])
        # Positions are kept where they are not a range.
        total += (
            method.max_nbytes(group, math.prod(lead), tokens - exact) + 4 * tokens + CHECKSUM_BYTES
        )
        total += kept * itemsize(dtype)
    return total


def _check(key_shape: Shape, value_shape: Shape, dtype: str) -> None:
    if dtype not in FLOATING:
        raise DTypeError(f"dtype must be one of {', '.join(FLOATING)}, got {dtype!r}")
    if len(key_shape) < 2 or tuple(key_shape[:-1]) != tuple(value_shape[:-1]):
        raise ShapeError(
            "shapes must be (..., seq_len, head_dim) and agree in all sizes but the last, "
            f"got {tuple(key_shape)} and {tuple(value_shape)}"
        )
