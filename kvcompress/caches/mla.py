"""`MlaCompressedKVCache`: one latent per token, not the keys and values of all heads."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompress.arrays import Array, array_namespace, device, is_concrete, library_name
from kvcompress.caches.latent_attention import MultiHeadLatentAttention
from kvcompress.errors import NamespaceError, SettingError, ShapeError, UnknownLayer, check_integer


class MlaCompressedKVCache:
    """A cache of latents and RoPE keys, one layer each per `MultiHeadLatentAttention`.

    The batch size is that of the first tokens appended; tokens of a layer get the positions 0, 1,
    and so on. What is read is always a copy. Every error is raised before anything changes. An
    append copies the tokens of its layer. One thread at a time.

    Parameters
    ----------
    layers : sequence of MultiHeadLatentAttention

    Raises
    ------
    SettingError
        If there is no layer.
    NamespaceError, DTypeError, ShapeError
        If the projections of a layer do not fit together.
    """

    def __init__(self, layers: Sequence[MultiHeadLatentAttention]) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise SettingError("layers must hold at least one MultiHeadLatentAttention, got none")
        for layer in self.layers:
            layer.check()
        self._tokens: list[tuple[Array, Array] | None] = [None] * len(self.layers)

    def __repr__(self) -> str:
        lengths = [0 if held is None else held[0].shape[1] for held in self._tokens]
        library = library_name(array_namespace(self.layers[0].kv_down))
        return (
            f"MlaCompressedKVCache({len(self.layers)} layers, batch {self.batch}, {library}, "
            f"{min(lengths)} to {max(lengths)} tokens)"
        )

    @property
    def batch(self) -> int | None:
        """Batch size; None before the first append."""
        return next((held[0].shape[0] for held in self._tokens if held is not None), None)

    def append(self, layer: int, hidden: Array, /) -> None:
        """Project the hidden states of new tokens and append the latents to one layer.

        Parameters
        ----------
        layer : int
        hidden : array ``[batch, new tokens, hidden_dim]``

        Raises
        ------
        UnknownLayer, NamespaceError, DTypeError, ShapeError
        """
        start, projections = self.seq_len(layer), self.layers[layer]
        projections.check_hidden(hidden)
        xp = array_namespace(hidden)
        positions = xp.arange(start, start + hidden.shape[1], device=device(hidden))
        self.append_compressed(layer, *projections.compress(hidden, positions))

    def append_compressed(self, layer: int, latent: Array, rope_key: Array, /) -> None:
        """Append latents and RoPE keys to one layer, wholly or not at all.

        Parameters
        ----------
        layer : int
        latent : array ``[batch, new tokens, kv_lora_rank]``
            Normed, where there is a norm.
        rope_key : array ``[batch, new tokens, rope_dim]``
            Rotated by the positions that follow the tokens already held.

        Raises
        ------
        UnknownLayer, NamespaceError, DTypeError, ShapeError
        """
        self._check_layer(layer)
        self.layers[layer].check_compressed(latent, rope_key)
        if not (is_concrete(latent) and is_concrete(rope_key)):
            raise NamespaceError("the tokens are traced by a compiler; a cache holds real arrays")
        if self.batch not in (None, latent.shape[0]):
            raise ShapeError(f"the cache holds a batch of {self.batch}, got {latent.shape[0]}")
        xp, held = array_namespace(latent), self._tokens[layer]
        if held is None:
            self._tokens[layer] = (xp.asarray(latent, copy=True), xp.asarray(rope_key, copy=True))
        else:
            self._tokens[layer] = (
                xp.concat([held[0], latent], axis=1),
                xp.concat([held[1], rope_key], axis=1),
            )

    def get_kv(self, layer: int) -> tuple[Array, Array]:
        """Keys and values of all heads, restored from the latents of one layer.

        Returns
        -------
        k : array ``[batch, num_heads, seq_len, nope_dim + rope_dim]``
        v : array ``[batch, num_heads, seq_len, v_head_dim]``

        Raises
        ------
        UnknownLayer
        ShapeError
            If nothing was ever appended to any layer, so that the batch size is unknown.
        """
        held = self._held(layer)
        return self.layers[layer].restore(*held)

    def get_compressed_kv(self, layer: int) -> tuple[Array, Array]:
        """Latents and RoPE keys of one layer.

        Returns
        -------
        latent : array ``[batch, seq_len, kv_lora_rank]``
        rope_key : array ``[batch, seq_len, rope_dim]``

        Raises
        ------
        UnknownLayer
        ShapeError
            As of `get_kv`.
        """
        latent, rope_key = self._held(layer)
        xp = array_namespace(latent)
        return xp.asarray(latent, copy=True), xp.asarray(rope_key, copy=True)

    def seq_len(self, layer: int = 0) -> int:
        """Tokens that one layer holds.

        Raises
        ------
        UnknownLayer
        """
        self._check_layer(layer)
        held = self._tokens[layer]
        return 0 if held is None else int(held[0].shape[1])

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, in all layers; those not longer stay as they are.

        Raises
        ------
        SettingError
            If `length` is no integer of at least 0.
        """
        check_integer("length", length, 0)
        for layer, held in enumerate(self._tokens):
            if held is not None and self.seq_len(layer) > length:
                xp = array_namespace(*held)
                # A copy: a slice would keep the forgotten tokens alive.
                latent, rope_key = (xp.asarray(x[:, :length, :], copy=True) for x in held)
                self._tokens[layer] = (latent, rope_key)

    def _check_layer(self, layer: int) -> None:
        if layer not in range(len(self.layers)):
            raise UnknownLayer(f"layer must be from 0 to {len(self.layers) - 1}, got {layer!r}")

    def _held(self, layer: int) -> tuple[Array, Array]:
        self._check_layer(layer)
        held = self._tokens[layer]
        if held is not None:
            return held
        if self.batch is None:
            raise ShapeError("the batch size is not known before the first append")
        like = self.layers[layer]
        xp = array_namespace(like.kv_down)

        def empty(width: int) -> Array:
            kind, where = like.kv_down.dtype, device(like.kv_down)
            return xp.zeros((self.batch, 0, width), dtype=kind, device=where)

        return empty(like.kv_lora_rank), empty(like.rope_dim)
