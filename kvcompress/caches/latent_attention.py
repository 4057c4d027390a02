"""Multi-head latent attention: projections to what is cached of a token, and back up from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcompress.arrays import (
    Array,
    array_namespace,
    astype,
    dtype_name,
    pytree,
    register_pytrees,
)
from kvcompress.caches.projections import check_like, check_projections
from kvcompress.errors import ShapeError
from kvcompress.rope.embedding import RoPE


@pytree(
    data=("kv_down", "key_up", "value_up", "key_rope", "latent_norm"), meta=("rope", "norm_eps")
)
@dataclass(frozen=True, eq=False)
class MultiHeadLatentAttention:
    """Key and value projections of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    A token is cached as a latent, from which the keys and values of all heads are projected, and
    as one RoPE key that all heads share. Products are float32 inside. A JAX pytree: `compress` and
    `restore` work inside ``jax.jit``.

    Parameters
    ----------
    kv_down : array ``[hidden_dim, kv_lora_rank]``
        Hidden state to latent (``W^DKV``, transposed).
    key_up : array ``[num_heads, kv_lora_rank, nope_dim]``
        Latent to the part of each head's key without position (``W^UK``).
    value_up : array ``[num_heads, kv_lora_rank, v_head_dim]``
        Latent to each head's value (``W^UV``).
    key_rope : array ``[hidden_dim, rope_dim]``
        Hidden state to the RoPE key (``W^KR``).
    rope : RoPE
        Rotates the RoPE key; DeepSeek's is ``RoPE(rope_dim, interleaved=True)``. That of
        `RoPE.from_config` is for keys that transformers cached: it reorders DeepSeek-V3's.
    latent_norm : array ``[kv_lora_rank]``, optional
        Weight of an RMSNorm of the latent, before it is cached (``kv_a_layernorm``).
    norm_eps : float
        Added to the mean square in that norm.

    Notes
    -----
    All arrays are of one library, dtype (float16, bfloat16 or float32) and device. `compress`,
    `restore` and `MlaCompressedKVCache` check that; construction cannot, because JAX constructs
    it from tracers.
    """

    kv_down: Array
    key_up: Array
    value_up: Array
    key_rope: Array
    rope: RoPE
    latent_norm: Array | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        register_pytrees()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled arrays may be the first thing of JAX in this process.
        self.__dict__.update(state)
        register_pytrees()

    @property
    def num_heads(self) -> int:
        """Heads that keys and values are restored for."""
        return int(self.key_up.shape[0])

    @property
    def hidden_dim(self) -> int:
        """Width of a hidden state."""
        return int(self.kv_down.shape[0])

    @property
    def kv_lora_rank(self) -> int:
        """Width of a latent."""
        return int(self.kv_down.shape[1])

    @property
    def rope_dim(self) -> int:
        """Width of the shared RoPE key."""
        return int(self.key_rope.shape[1])

    @property
    def dtype(self) -> str:
        """Dtype of the projections, and so of all that is cached and restored."""
        return dtype_name(self.kv_down.dtype)

    @property
    def weight(self) -> Array:
        """`kv_down`, whose library, dtype and device all that is cached has."""
        return self.kv_down

    @property
    def cached_sizes(self) -> tuple[int, int, int]:
        """``(1, rope_dim, kv_lora_rank)``: RoPE keys are cached as keys, latents as values."""
        return 1, self.rope_dim, self.kv_lora_rank

    def restore_cached(self, k: Array, v: Array, /) -> tuple[Array, Array]:
        """Restore the keys and values of a sequence, as `MlaCompressedKVCache` holds it.

        Parameters
        ----------
        k : array ``[1, seq_len, rope_dim]``
            RoPE keys.
        v : array ``[1, seq_len, kv_lora_rank]``
            Latents.

        Returns
        -------
        k : array ``[num_heads, seq_len, nope_dim + rope_dim]``
        v : array ``[num_heads, seq_len, v_head_dim]``

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
            If the arrays do not fit the projections.
        """
        keys, values = self.restore(v, k)
        return keys[0, ...], values[0, ...]

    def check(self) -> None:
        """Check that the projections fit together.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
        """
        check_projections(
            {
                "kv_down": (self.kv_down, ("hidden_dim", "kv_lora_rank")),
                "key_rope": (self.key_rope, ("hidden_dim", "rope_dim")),
                "key_up": (self.key_up, ("num_heads", "kv_lora_rank", "nope_dim")),
                "value_up": (self.value_up, ("num_heads", "kv_lora_rank", "v_head_dim")),
                "latent_norm": (self.latent_norm, ("kv_lora_rank",)),
            },
            {"rope_dim": self.rope.head_dim},
        )

    def compress(self, hidden: Array, positions: Array, /) -> tuple[Array, Array]:
        """Project hidden states to what is cached.

        Parameters
        ----------
        hidden : array ``[batch, seq_len, hidden_dim]``
        positions : integer array ``[seq_len]`` or ``[batch, seq_len]``

        Returns
        -------
        latent : array ``[batch, seq_len, kv_lora_rank]``
            Normed, if there is a norm.
        rope_key : array ``[batch, seq_len, rope_dim]``
            Rotated.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
            If the arrays do not fit the projections, or these do not fit together.
        """
        self.check()
        self.check_hidden(hidden)
        xp = array_namespace(hidden, positions)
        full = astype(hidden, "float32")
        rope_key = self.rope.apply(full @ astype(self.key_rope, "float32"), positions)
        latent = full @ astype(self.kv_down, "float32")
        if self.latent_norm is not None:
            power = xp.mean(latent * latent, axis=-1, keepdims=True)
            latent = latent / xp.sqrt(power + self.norm_eps) * astype(self.latent_norm, "float32")
        return astype(latent, self.dtype), astype(rope_key, self.dtype)

    def restore(self, latent: Array, rope_key: Array, /) -> tuple[Array, Array]:
        """Project cached latents up to the keys and values of all heads.

        Parameters
        ----------
        latent : array ``[batch, seq_len, kv_lora_rank]``
        rope_key : array ``[batch, seq_len, rope_dim]``

        Returns
        -------
        k : array ``[batch, num_heads, seq_len, nope_dim + rope_dim]``
        v : array ``[batch, num_heads, seq_len, v_head_dim]``

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
            As of `compress`.
        """
        self.check()
        self.check_compressed(latent, rope_key)
        xp = array_namespace(latent)
        batch, tokens, _ = latent.shape
        full = astype(latent, "float32")[:, None, :, :]
        nope, v = (
            astype(full @ astype(w, "float32"), self.dtype) for w in (self.key_up, self.value_up)
        )
        shared = (batch, self.num_heads, tokens, self.rope_dim)
        rope = xp.broadcast_to(rope_key[:, None, :, :], shared)
        return xp.concat([nope, rope], axis=-1), v

    def check_hidden(self, hidden: Array, /) -> None:
        """Check that hidden states fit the projections.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
        """
        self._check_tokens("hidden", hidden, self.hidden_dim)

    def check_compressed(self, latent: Array, rope_key: Array, /) -> None:
        """Check that a latent and a RoPE key fit the projections and each other.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
        """
        self._check_tokens("latent", latent, self.kv_lora_rank)
        self._check_tokens("rope_key", rope_key, self.rope_dim)
        if tuple(latent.shape[:2]) != tuple(rope_key.shape[:2]):
            raise ShapeError(
                f"latent and rope_key must agree in batch and seq_len, "
                f"got {tuple(latent.shape)} and {tuple(rope_key.shape)}"
            )

    def _check_tokens(self, name: str, x: Array, width: int) -> None:
        check_like(name, x, "kv_down", self.kv_down)
        if x.ndim != 3 or x.shape[2] != width:
            raise ShapeError(
                f"{name} must be [batch, seq_len, {width}], got shape {tuple(x.shape)}"
            )
