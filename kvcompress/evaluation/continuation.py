"""A text that a model goes on with from a changed cache: how far its predictions move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcompress.arrays import HostArray, to_host
from kvcompress.errors import ShapeError
from kvcompress.evaluation.metrics import relative_error
from kvcompress.integrations.transformers.attention import AttentionCall, record_attention
from kvcompress.integrations.transformers.cache import KV, cached_kv, replace_kv
from kvcompress.integrations.transformers.capture import calls_of_layers, keep_call
from kvcompress.integrations.transformers.models import LanguageModel, token_batch
from kvcompress.ops.casting import cast

_ROWS = 64
"""Next-token distributions compared at a time."""


@dataclass(frozen=True, eq=False)
class Score:
    """What a changed cache does to the model, token by token.

    Attributes
    ----------
    kl : array ``[scored]``, float64
        Kullback-Leibler divergence of the next-token distribution from the original cache's, nats.
    original_nll, nll : arrays ``[scored]``, float64
        Negative log-likelihood of the true next token, in nats.
    same_top : array ``[scored]``, bool
        Whether the most likely next token is the same.
    attention_error : dict of layer to float
        Relative error of the attention output, for the original queries of the scored tokens.
    """

    kl: HostArray
    original_nll: HostArray
    nll: HostArray
    same_top: HostArray
    attention_error: Mapping[int, float]


class Continuation:
    """A text of which the model has read a prefix; the rest is scored on changed caches.

    Teacher-forced: the model always reads the true tokens.

    Parameters
    ----------
    lm : LanguageModel
    tokens : array ``[prefix + scored + 1]``, int64
        Token ids. The last one is only predicted.
    prefix : int
        Tokens in the cache.

    Attributes
    ----------
    kv : mapping of layer to keys and values ``[1, num_heads, tokens, head_dim]``
        The model's cache after the prefix, in `lm.cache_dtype`: the original.
    queries : mapping of layer to queries ``[1, num_query_heads, scored, head_dim]``
        Of the scored tokens, as the original cache makes them; see `AttentionCall`.
    partial : frozenset of int
        Layers that no longer hold the first tokens.

    Raises
    ------
    ShapeError
        If nothing is left to be scored.
    UnsupportedModel
    """

    def __init__(self, lm: LanguageModel, tokens: HostArray, /, *, prefix: int) -> None:
        if not 0 < prefix < len(tokens) - 1:
            raise ShapeError(f"prefix must be from 1 to {len(tokens) - 2}, got {prefix}")
        self._lm = lm
        self._scored = token_batch(lm, tokens[prefix:-1])
        self._next = torch.as_tensor(tokens[prefix + 1 :], device=lm.model.device)[:, None]
        with torch.no_grad():
            read = lm.model.base_model(token_batch(lm, tokens[:prefix]), use_cache=True)
        self._cache = read.past_key_values
        self.kv: KV = {
            layer: (cast(k, dtype=lm.cache_dtype), cast(v, dtype=lm.cache_dtype))
            for layer, (k, v) in cached_kv(self._cache).items()
        }
        self.partial = frozenset(i for i, (k, _) in self.kv.items() if k.shape[-2] < prefix)
        calls: dict[int, AttentionCall] = {}
        with record_attention(lm.model, lambda call: keep_call(calls, call)):
            self._original = self._continue(self.kv)
        self._calls = calls_of_layers(calls, self.kv)
        self.queries = {layer: call.query for layer, call in self._calls.items()}
        with torch.no_grad():
            self._outputs = {i: to_host(c.attend(c.key, c.value)) for i, c in self._calls.items()}

    def score(self, kv: KV, /) -> Score:
        """Continue from other keys and values of the prefix.

        Parameters
        ----------
        kv : mapping of layer to keys and values
            As the attribute `kv`.

        Raises
        ------
        ShapeError
        """
        logits = self._continue(kv)
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, logits.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            p, q = (torch.log_softmax(x[rows].float(), -1) for x in (self._original, logits))
            kl = (p.exp() * (p - q)).sum(-1)
            losses = (-torch.gather(x, 1, self._next[rows])[:, 0] for x in (p, q))
            parts.append((kl, *losses, p.argmax(-1) == q.argmax(-1)))
        divergence, original_nll, nll, same_top = (
            to_host(torch.cat(column)) for column in zip(*parts, strict=True)
        )
        return Score(
            kl=divergence.astype(np.float64),
            original_nll=original_nll.astype(np.float64),
            nll=nll.astype(np.float64),
            same_top=same_top,
            attention_error={i: self._attention_error(i, *pair) for i, pair in kv.items()},
        )

    def _continue(self, kv: KV) -> Tensor:
        """Logits ``[scored, vocabulary]``."""
        cache = replace_kv(self._cache, kv)
        with torch.no_grad():
            return self._lm.model(self._scored, past_key_values=cache, use_cache=True).logits[0]

    def _attention_error(self, layer: int, k: Tensor, v: Tensor) -> float:
        call = self._calls[layer]
        with torch.no_grad():
            changed = (
                torch.cat([new.to(old.dtype), old[..., new.shape[-2] :, :]], dim=-2)
                for new, old in ((k, call.key), (v, call.value))
            )
            return relative_error(self._outputs[layer], to_host(call.attend(*changed)))
