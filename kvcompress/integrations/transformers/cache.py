"""Caches of transformers: the keys and values that one holds, and a copy that holds others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from kvcompress.errors import ShapeError, UnsupportedModel

Cache: TypeAlias = Any
KV: TypeAlias = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values ``[batch, num_heads, tokens, head_dim]`` by layer."""


def cached_kv(cache: Cache, /) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values ``[batch, num_heads, tokens, head_dim]`` that a cache holds, by layer.

    Layers with a sliding window hold the last tokens only. Layers that read the cache of another
    one hold nothing, and are left out.

    Raises
    ------
    UnsupportedModel
        If a layer is not one of a ``DynamicCache`` with keys and values.
    """
    held = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedModel(
                f"layer {index} of the cache is a {type(layer).__name__}; "
                "known are DynamicLayer and DynamicSlidingWindowLayer"
            )
        if not isinstance(layer, DummyLayer) and layer.is_initialized:
            held[index] = layer.keys, layer.values
    return held


def replace_kv(cache: Cache, kv: KV, /) -> Cache:
    """Return a copy of a cache that holds other keys and values of the same tokens.

    Parameters
    ----------
    cache : transformers.Cache
        Not changed, nor by what is done to the copy.
    kv : mapping of layer to keys and values
        For every layer that `cached_kv` gives, of the same shapes, any floating dtype.

    Raises
    ------
    ShapeError
        If layers or shapes are others.
    UnsupportedModel
    """
    held = cached_kv(cache)
    if held.keys() != kv.keys():
        raise ShapeError(f"expected keys and values of layers {list(held)}, got {list(kv)}")
    # A layer never writes into its tensors, it concatenates: a shallow copy is one of its own.
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for index, pair in held.items():
        layer = copied.layers[index]
        layer.keys, layer.values = (
            _like(new, old, f"layer {index}") for new, old in zip(kv[index], pair, strict=True)
        )
    return copied


def _like(new: Tensor, old: Tensor, name: str) -> Tensor:
    if new.shape != old.shape:
        raise ShapeError(f"{name} holds {tuple(old.shape)}, got {tuple(new.shape)}")
    return new.to(dtype=old.dtype, device=old.device)
