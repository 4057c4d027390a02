"""The kinds of caches in blocks, each with an oracle of what it holds and gives back.

A *row* is what a cache should hold of one token in one layer: two arrays ``[heads, width]``.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress import (
    MlaCompressedKVCache,
    MultiHeadLatentAttention,
    PagedKVCache,
    PerHeadLatentAttention,
    RoPE,
)

LAYERS, BLOCKS, BLOCK, HEADS = 2, 9, 4, 2
KEY_DIM, VALUE_DIM, LATENT, VALUE_LATENT = 3, 2, 2, 1
HIDDEN, RANK, ROPE, NOPE = 6, 5, 4, 2
ROTATION = RoPE(ROPE, 100.0, interleaved=True)

Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of cache.

    Attributes
    ----------
    exact : bool
        Whether sums are exact in float32 in any order, so that results are the oracle's.
    """

    name: str
    exact: bool = True

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def make(self, xp: Any, *, num_blocks: int = BLOCKS, block_size: int = BLOCK) -> Any: ...

    @abstractmethod
    def sizes(self, layer: int) -> tuple[int, int, int]:
        """Heads and widths of what is held."""

    def restored_sizes(self, layer: int) -> tuple[int, int, int]:
        """Heads and widths of what `get_kv` returns."""
        return HEADS, KEY_DIM, VALUE_DIM

    def inputs(self, layer: int, tokens: list[int]) -> tuple[np.ndarray, ...]:
        """What a model would append."""
        k, v = ([part(t, n) for t in tokens] for part, n in ((keys, KEY_DIM), (values, VALUE_DIM)))
        return stack(k, KEY_DIM), stack(v, VALUE_DIM)

    def add(self, cache: Any, layer: Any, seq_id: Any, *arrays: Any) -> None:
        """Append `inputs`."""
        cache.append(layer, seq_id, *arrays)

    @abstractmethod
    def row(self, layer: int, token: int, position: int) -> Row: ...

    @abstractmethod
    def restored(self, layer: int, row: Row) -> Row: ...

    def append(self, xp: Any, cache: Any, layer: Any, seq_id: Any, tokens: list[int]) -> list[Row]:
        """Append tokens and return the rows that the cache should hold for them."""
        start = cache.seq_len(layer, seq_id)
        self.add(cache, layer, seq_id, *map(xp.asarray, self.inputs(layer, tokens)))
        return [self.row(layer, t, start + i) for i, t in enumerate(tokens)]

    def held(self, cache: Any, layer: int, seq_id: Any) -> tuple[Any, Any]:
        return cache.get_compressed_kv(layer, seq_id)

    def add_held(self, cache: Any, layer: int, seq_id: Any, k: Any, v: Any) -> None:
        cache.append_compressed(layer, seq_id, k, v)

    def check_held(self, xp: Any, cache: Any, layer: int, seq_id: Any, rows: list[Row]) -> None:
        self.check(xp, self.held(cache, layer, seq_id), rows, self.sizes(layer))

    def check_restored(self, xp: Any, kv: tuple[Any, Any], layer: int, rows: list[Row]) -> None:
        self.check(xp, kv, [self.restored(layer, row) for row in rows], self.restored_sizes(layer))

    def check(self, xp: Any, kv: tuple[Any, Any], rows: list[Row], sizes: Any) -> None:
        heads, *widths = sizes
        for i, (got, width) in enumerate(zip(kv, widths, strict=True)):
            assert tuple(got.shape) == (heads, len(rows), width)
            expected = stack([row[i] for row in rows], width, heads)
            if self.exact:
                np.testing.assert_array_equal(xp.numpy(got), expected)
            else:
                np.testing.assert_allclose(xp.numpy(got), expected, rtol=1e-5, atol=2e-4)


class Plain(Kind):
    def make(self, xp: Any, *, num_blocks: int = BLOCKS, block_size: int = BLOCK) -> Any:
        return PagedKVCache(
            LAYERS, num_blocks, HEADS, KEY_DIM, value_head_dim=VALUE_DIM, block_size=block_size,
            dtype="float32", xp=xp.module,
        )  # fmt: skip

    def sizes(self, layer: int) -> tuple[int, int, int]:
        return HEADS, KEY_DIM, VALUE_DIM

    def row(self, layer: int, token: int, position: int) -> Row:
        return keys(token, KEY_DIM), values(token, VALUE_DIM)

    def restored(self, layer: int, row: Row) -> Row:
        return row

    def held(self, cache: Any, layer: int, seq_id: Any) -> tuple[Any, Any]:
        return cache.get_kv(layer, seq_id)

    def add_held(self, cache: Any, layer: int, seq_id: Any, k: Any, v: Any) -> None:
        cache.append(layer, seq_id, k, v)


class PerHead(Kind):
    """Layer 0 has projections of values of its own and adds `rope_key`; layer 1 has one pair."""

    def make(self, xp: Any, *, num_blocks: int = BLOCKS, block_size: int = BLOCK) -> Any:
        layers = [per_head(xp, layer) for layer in range(LAYERS)]
        return MlaCompressedKVCache(layers, num_blocks, block_size=block_size)

    def row(self, layer: int, token: int, position: int) -> Row:
        w = per_head_weights(layer)
        return (
            keys(token, KEY_DIM) @ w["down_proj"],
            values(token, KEY_DIM if layer else VALUE_DIM) @ value_weights(w)[0],
        )

    def inputs(self, layer: int, tokens: list[int]) -> tuple[np.ndarray, ...]:
        width = KEY_DIM if layer else VALUE_DIM
        k, v = [keys(t, KEY_DIM) for t in tokens], [values(t, width) for t in tokens]
        return stack(k, KEY_DIM), stack(v, width)

    def restored(self, layer: int, row: Row) -> Row:
        w = per_head_weights(layer)
        k = row[0] @ w["up_proj"]
        if "rope_key" in w:
            k = k + row[0] @ w["rope_key"]
        return k, row[1] @ value_weights(w)[1]

    def sizes(self, layer: int) -> tuple[int, int, int]:
        return HEADS, LATENT, LATENT if layer else VALUE_LATENT

    def restored_sizes(self, layer: int) -> tuple[int, int, int]:
        return HEADS, KEY_DIM, KEY_DIM if layer else VALUE_DIM


class DeepSeek(Kind):
    """Layer 1 norms its latents."""

    def make(self, xp: Any, *, num_blocks: int = BLOCKS, block_size: int = BLOCK) -> Any:
        layers = [deepseek(xp, layer, norm=layer == 1) for layer in range(LAYERS)]
        return MlaCompressedKVCache(layers, num_blocks, block_size=block_size)

    def inputs(self, layer: int, tokens: list[int]) -> tuple[np.ndarray, ...]:
        rows = [hidden_state(t) for t in tokens]
        return (np.array(rows, dtype=np.float32).reshape(len(tokens), HIDDEN),)

    def sizes(self, layer: int) -> tuple[int, int, int]:
        return 1, ROPE, RANK

    def restored_sizes(self, layer: int) -> tuple[int, int, int]:
        return HEADS, NOPE + ROPE, VALUE_DIM

    def add(self, cache: Any, layer: Any, seq_id: Any, *arrays: Any) -> None:
        cache.append_hidden(layer, seq_id, *arrays)

    def row(self, layer: int, token: int, position: int) -> Row:
        weights = deepseek_weights(layer, norm=layer == 1)
        latent, key = cached(weights, hidden_state(token), position)
        return key[None], latent[None]

    def restored(self, layer: int, row: Row) -> Row:
        return up(deepseek_weights(layer, norm=layer == 1), row[1][0], row[0][0])


KINDS = (Plain("paged"), PerHead("per head"), DeepSeek("deepseek", exact=False))


def stack(rows: list[np.ndarray], width: int, heads: int = HEADS) -> np.ndarray:
    """``[heads, tokens, width]``, float32."""
    shape = (len(rows), heads, width)
    return np.array(rows, dtype=np.float32).reshape(shape).transpose(1, 0, 2).copy()


def keys(token: int, width: int) -> np.ndarray:
    """``[HEADS, width]``: every number tells its token, head and channel; exact in float32."""
    head, channel = np.ogrid[:HEADS, :width]
    return token + (head * 4 + channel) / 8


def values(token: int, width: int) -> np.ndarray:
    return -keys(token, width)


def hidden_state(token: int) -> np.ndarray:
    return np.random.default_rng(token).integers(-3, 4, HIDDEN).astype(np.float64)


def small(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Small integers, so that sums of products are exact in float32 in any order."""
    rng = np.random.default_rng(seed)
    return {n: rng.integers(-2, 3, shape).astype(np.float32) for n, shape in shapes.items()}


def per_head_weights(layer: int) -> dict[str, np.ndarray]:
    shapes = {"down_proj": (KEY_DIM, LATENT), "up_proj": (LATENT, KEY_DIM)}
    if layer == 0:
        shapes |= {"rope_key": (LATENT, KEY_DIM), "value_down_proj": (VALUE_DIM, VALUE_LATENT)}
        shapes |= {"value_up_proj": (VALUE_LATENT, VALUE_DIM)}
    return small(layer + 10, shapes)


def value_weights(w: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return w.get("value_down_proj", w["down_proj"]), w.get("value_up_proj", w["up_proj"])


def per_head(xp: Any, layer: int = 0, dtype: Any = "float32") -> PerHeadLatentAttention:
    arrays = {n: xp.asarray(x.astype(dtype)) for n, x in per_head_weights(layer).items()}
    return PerHeadLatentAttention(**arrays, num_heads=HEADS)


def deepseek_weights(seed: int = 0, *, norm: bool = False) -> dict[str, np.ndarray]:
    arrays = small(
        seed,
        {
            "kv_down": (HIDDEN, RANK),
            "key_up": (HEADS, RANK, NOPE),
            "value_up": (HEADS, RANK, VALUE_DIM),
            "key_rope": (HIDDEN, ROPE),
        },
    )
    if norm:
        arrays["latent_norm"] = np.arange(1, RANK + 1, dtype=np.float32)
    return arrays


def deepseek(
    xp: Any, seed: int = 0, *, norm: bool = False, dtype: Any = "float32"
) -> MultiHeadLatentAttention:
    arrays = {n: xp.asarray(x.astype(dtype)) for n, x in deepseek_weights(seed, norm=norm).items()}
    return MultiHeadLatentAttention(**arrays, rope=ROTATION)


def cached(w: dict[str, np.ndarray], hidden: np.ndarray, position: int) -> tuple[Any, Any]:
    """Float64 oracle for one token: its latent and its RoPE key."""
    latent = w["kv_down"].T.astype(np.float64) @ hidden
    if "latent_norm" in w:
        latent = latent / np.sqrt((latent**2).mean() + 1e-6) * w["latent_norm"]
    key = w["key_rope"].T.astype(np.float64) @ hidden
    for i in range(0, ROPE, 2):
        turned = complex(*key[i : i + 2]) * np.exp(1j * position * ROTATION.theta ** (-i / ROPE))
        key[i : i + 2] = turned.real, turned.imag
    return latent, key


def up(w: dict[str, np.ndarray], latent: np.ndarray, key: np.ndarray) -> Row:
    """Float64 oracle for one token: keys and values of every head."""
    k = [np.concatenate([w["key_up"][h].T @ latent, key]) for h in range(HEADS)]
    v = [w["value_up"][h].T @ latent for h in range(HEADS)]
    return np.array(k, dtype=np.float64), np.array(v, dtype=np.float64)


def poison(xp: Any, cache: Any, blocks: list[int]) -> None:
    """Overwrite blocks with NaN in all pools, as no user can."""
    hit = np.isin(np.arange(cache.num_total_blocks * cache.block_size) // cache.block_size, blocks)
    for pools in (cache._keys, cache._values):
        for layer, x in enumerate(pools.arrays):
            pools.arrays[layer] = xp.asarray(np.where(hit[:, None, None], np.nan, xp.numpy(x)))


def state(xp: Any, kind: Kind, cache: Any) -> Any:
    """Everything about a cache that can be observed, and its bookkeeping."""
    blocks = cache._blocks
    return pickle.dumps(
        (
            [(name, list(s.table), list(s.lengths)) for name, s in blocks.sequences.items()],
            list(blocks.references),
            list(blocks.free),
            [
                [xp.numpy(x) for x in kind.held(cache, layer, seq_id)]
                for seq_id in blocks.sequences
                for layer in range(cache.num_layers)
            ],
        )
    )
