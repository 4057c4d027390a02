"""What the attention of a model of transformers reads of a text, and how its cache is laid out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcompress.arrays import HostArray
from kvcompress.cross_layer.layer_group import LayerShape
from kvcompress.errors import UnsupportedModel
from kvcompress.integrations.transformers.attention import AttentionCall, record_attention
from kvcompress.integrations.transformers.cache import KV, cached_kv
from kvcompress.integrations.transformers.models import LanguageModel, token_batch
from kvcompress.rope.embedding import RoPE


def capture(lm: LanguageModel, tokens: HostArray, /) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Run the model on a text, and return what attention reads.

    Parameters
    ----------
    lm : LanguageModel
    tokens : array ``[tokens]``, int64
        Token ids.

    Returns
    -------
    dict of layer to keys, values and queries ``[1, heads, tokens, head_dim]``
        Of the layers that have a cache, after RoPE; queries as in `AttentionCall`. Of layers with
        a sliding window, all tokens too.

    Raises
    ------
    UnsupportedModel
    """
    calls: dict[int, AttentionCall] = {}
    with torch.no_grad(), record_attention(lm.model, lambda call: keep_call(calls, call)):
        output = lm.model.base_model(token_batch(lm, tokens), use_cache=True)
    kept = calls_of_layers(calls, cached_kv(output.past_key_values))
    return {layer: (call.key, call.value, call.query) for layer, call in kept.items()}


def layer_shapes(lm: LanguageModel, /) -> dict[int, tuple[LayerShape, int | None]]:
    """Shapes and rotary embeddings of the layers that have a cache, and their sliding windows.

    Returns
    -------
    dict of int to pairs
        Layers are counted among those that have a cache, as `compress_cache` counts them.

    Raises
    ------
    UnsupportedModel, SettingError
        If the cache or the rotary embedding is of a kind that is not known.
    """
    with torch.no_grad():
        output = lm.model.base_model(token_batch(lm, [0]), use_cache=True)
    cache, found = output.past_key_values, {}
    for place, (index, (k, v)) in enumerate(cached_kv(cache).items()):
        rope = RoPE.from_config(lm.model.config, layer=index)
        window = getattr(cache.layers[index], "sliding_window", None)
        found[place] = LayerShape(k.shape[1], k.shape[3], v.shape[3], rope), window
    return found


def keep_call(calls: dict[int, AttentionCall], call: AttentionCall) -> None:
    """Keep the last call of every layer."""
    calls[call.layer] = call


def calls_of_layers(calls: Mapping[int, AttentionCall], kv: KV) -> dict[int, AttentionCall]:
    """Return the calls of the layers that have a cache; one without a call is not supported."""
    missing = [layer for layer in kv if layer not in calls]
    if missing:
        raise UnsupportedModel(
            f"layers {missing} have a cache, but do not attend through the attention interface "
            "of transformers"
        )
    return {layer: calls[layer] for layer in kv}
