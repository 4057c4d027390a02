"""`MlaCompressedKVCache`: latents in blocks of tokens, from which keys and values are restored."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import fields, replace

from kvcompress.arrays import Array, array_namespace, detach, device
from kvcompress.caches.base import BlockCache
from kvcompress.caches.latent_attention import MultiHeadLatentAttention
from kvcompress.caches.per_head import PerHeadLatentAttention
from kvcompress.caches.pools import check_concrete, check_tokens
from kvcompress.caches.projections import check_like
from kvcompress.errors import LayoutError, SettingError, ShapeError
from kvcompress.ops.slots import Paged


class MlaCompressedKVCache(BlockCache):
    """A cache of latents in blocks, with many sequences; keys and values are restored from them.

    It holds two arrays of a token in a layer, ``[heads, width]``. Of a `PerHeadLatentAttention`
    they are the latents of the keys and those of the values; of a `MultiHeadLatentAttention`, with
    one head, the RoPE key as key and the latent as value. Layers may be of either kind.

    Sequences own and share blocks as they do in a `PagedKVCache`. What is read is a copy. Neither
    what is held nor what is restored records gradients, not those of the projections either.
    Every error is raised before anything changes. A cache can be pickled and deep-copied. It is
    for one thread at a time.

    Parameters
    ----------
    layers : sequence of MultiHeadLatentAttention or PerHeadLatentAttention
        The projections of every layer, of one library, dtype and device, which are those of all
        that is held and restored.
    num_blocks : int
        At least 1. All of them are allocated at once, in every layer.
    block_size : int
        Tokens in a block.

    Raises
    ------
    SettingError
        If there is no layer, or a number is out of range.
    NamespaceError, DTypeError, ShapeError
        If the projections do not fit together, or a compiler traces them.
    """

    def __init__(
        self,
        layers: Iterable[MultiHeadLatentAttention | PerHeadLatentAttention],
        num_blocks: int,
        *,
        block_size: int = 16,
    ) -> None:
        self.layers = _checked(layers)
        weight = self.layers[0].weight
        super().__init__(
            num_blocks,
            block_size,
            [layer.cached_sizes for layer in self.layers],
            dtype=self.layers[0].dtype,
            xp=array_namespace(weight),
            device=device(weight),
        )

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in self.layers}))
        return f"MlaCompressedKVCache({self.num_layers} layers of {kinds}, {self._described()})"

    def append(self, layer: int, seq_id: Hashable, k: Array, v: Array, /) -> None:
        """Project the keys and values of new tokens to latents and append these, all or none.

        Parameters
        ----------
        layer : int
            One of a `PerHeadLatentAttention`; for others, see `append_hidden`.
        seq_id : hashable
        k : array ``[num_heads, new tokens, head_dim]``
        v : array ``[num_heads, new tokens, value_head_dim]``
            Both of the library, dtype and device of the projections.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        LayoutError
            If the layer projects hidden states.
        NamespaceError, ShapeError, DTypeError
            If the arrays do not fit the projections.
        OutOfBlocks
            If there are too few free blocks for the tokens and for the copies of shared blocks
            that they would be written to.
        """
        self.seq_len(layer, seq_id)
        projections = self.layers[layer]
        if not isinstance(projections, PerHeadLatentAttention):
            raise LayoutError(
                f"layer {layer} is a {type(projections).__name__}, which projects hidden states; "
                "use append_hidden(layer, seq_id, hidden), or append_compressed for latents"
            )
        sizes = projections.num_heads, projections.head_dim, projections.value_head_dim
        check_tokens(k, v, self._keys[0], *sizes)
        self._append(layer, seq_id, *projections.compress(detach(k), detach(v)))

    def append_hidden(self, layer: int, seq_id: Hashable, hidden: Array, /) -> None:
        """Project the hidden states of new tokens and append the latents, all or none.

        Parameters
        ----------
        layer : int
            One of a `MultiHeadLatentAttention`; for others, see `append`.
        seq_id : hashable
        hidden : array ``[new tokens, hidden_dim]``
            Of the library, dtype and device of the projections. The RoPE keys are rotated by the
            positions that follow the tokens already held, the first token being at position 0.

        Raises
        ------
        UnknownLayer, UnknownSequence, LayoutError, NamespaceError, ShapeError, DTypeError
            As of `append`; `LayoutError` if the layer projects keys and values.
        OutOfBlocks
            As of `append`.
        """
        start = self.seq_len(layer, seq_id)
        projections = self.layers[layer]
        if not isinstance(projections, MultiHeadLatentAttention):
            raise LayoutError(
                f"layer {layer} is a {type(projections).__name__}, which projects keys and values; "
                "use append(layer, seq_id, k, v), or append_compressed for latents"
            )
        check_like("hidden", hidden, "kv_down", projections.kv_down)
        check_concrete("hidden", hidden)
        if hidden.ndim != 2 or hidden.shape[1] != projections.hidden_dim:
            raise ShapeError(
                f"hidden must be [new tokens, {projections.hidden_dim}], "
                f"got shape {tuple(hidden.shape)}"
            )
        xp = array_namespace(hidden)
        positions = xp.arange(start, start + hidden.shape[0], device=device(hidden))
        latent, rope_key = projections.compress(detach(hidden)[None, ...], positions)
        self._append(layer, seq_id, rope_key, latent)

    def append_compressed(self, layer: int, seq_id: Hashable, k: Array, v: Array, /) -> None:
        """Append the latents of new tokens as they are, all or none.

        Parameters
        ----------
        layer : int
        seq_id : hashable
        k, v : arrays ``[heads, new tokens, width]``
            As `get_compressed_kv` returns them. RoPE keys must have been rotated by the positions
            that follow the tokens already held, and latents normed where the layer has a norm.

        Raises
        ------
        UnknownLayer, UnknownSequence, NamespaceError, ShapeError, DTypeError, OutOfBlocks
            As of `append`.
        """
        self.seq_len(layer, seq_id)
        check_tokens(k, v, self._keys[0], *self.layers[layer].cached_sizes)
        self._append(layer, seq_id, k, v)

    def get_compressed_kv(self, layer: int, seq_id: Hashable) -> tuple[Array, Array]:
        """Return the latents of one layer of a sequence, as new arrays.

        Returns
        -------
        k, v : arrays ``[heads, seq_len, width]``
            Of a `PerHeadLatentAttention`, the latents of the keys ``[num_heads, seq_len,
            latent_dim]`` and those of the values ``[num_heads, seq_len, value_latent_dim]``; of a
            `MultiHeadLatentAttention`, the RoPE keys ``[1, seq_len, rope_dim]`` and the latents
            ``[1, seq_len, kv_lora_rank]``.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        """
        return self._read(layer, seq_id)

    def paged_compressed_kv(self, layer: int, seq_id: Hashable) -> tuple[Paged, Paged]:
        """Return the latents of one layer of a sequence where they are, not copied.

        Returns
        -------
        k, v : Paged ``[heads, seq_len, width]``
            What `get_compressed_kv` returns; to be read before anything else is done to the cache.

        Raises
        ------
        UnknownLayer, UnknownSequence
            If there is no such layer or sequence.
        """
        return self._paged(layer, seq_id)

    def _restore(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        return self.layers[layer].restore_cached(k, v)


def _checked(
    layers: Iterable[MultiHeadLatentAttention | PerHeadLatentAttention],
) -> tuple[MultiHeadLatentAttention | PerHeadLatentAttention, ...]:
    """The layers, if each is latent attention and all fit into one cache."""
    accepted = "MultiHeadLatentAttention or PerHeadLatentAttention"
    if not isinstance(layers, Iterable):
        raise SettingError(f"layers must be a sequence of {accepted}, got {type(layers).__name__}")
    checked = tuple(layers)
    if not checked:
        raise SettingError(f"layers must hold at least one {accepted}, got none")
    for i, layer in enumerate(checked):
        if not isinstance(layer, MultiHeadLatentAttention | PerHeadLatentAttention):
            raise SettingError(f"layers must be {accepted}, got {type(layer).__name__}")
        layer.check()
        check_concrete(f"the projection of layer {i}", layer.weight)
        check_like(f"the projection of layer {i}", layer.weight, "layer 0", checked[0].weight)
    # Neither what is held nor what is restored records gradients.
    return tuple(
        replace(
            layer, **{field.name: detach(getattr(layer, field.name)) for field in fields(layer)}
        )
        for layer in checked
    )
