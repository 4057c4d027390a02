"""Models of Hugging Face transformers: what they read of a text, what a changed cache does to them.

Needs the extra ``hf``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvcompress._namespace import to_host
from kvcompress.errors import ShapeError, UnsupportedModel
from kvcompress.integrations.model_cache import KV, cached_kv, replace_kv
from kvcompress.integrations.recording import AttentionCall, record_attention
from kvcompress.metrics import HostArray, relative_error
from kvcompress.ops.casting import cast
from kvcompress.rope import RoPE
from kvcompress.spans.span import SpanLayer

__all__ = [
    "KV",
    "AttentionCall",
    "Continuation",
    "LanguageModel",
    "Score",
    "cached_kv",
    "capture",
    "load_model",
    "record_attention",
    "replace_kv",
    "span_layers",
]

_ROWS = 64
"""Next-token distributions compared at a time."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    cache_dtype : {"float16", "bfloat16"}
        What an engine would hold the model's cache in.
    """

    model: Any
    tokenizer: Any
    cache_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in 16 bits."""
        count: int = sum(x.numel() for x in self.model.parameters())
        return 2 * count

    def chunks(self, text: str, length: int, /) -> HostArray:
        """Cut a text into sequences; the rest at the end is left out.

        Returns
        -------
        array ``[chunks, length]``, int64
            Token ids. Every chunk starts with the token that starts a text for this model, if any.
        """
        start = self.tokenizer("a")["input_ids"][:1]
        start = start if start and start[0] == self.tokenizer.bos_token_id else []
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = length - len(start)
        count = len(ids) // size
        chunks = np.asarray(ids[: count * size], dtype=np.int64).reshape(count, size)
        lead = np.broadcast_to(np.asarray(start, dtype=np.int64), (count, len(start)))
        return np.concatenate([lead, chunks], axis=1)


def load_model(source: str | PathLike[str], /) -> LanguageModel:
    """Load a model and its tokenizer, onto the GPU if there is one.

    Parameters
    ----------
    source : str or path
        A directory, a name on the Hugging Face hub, or a ``.gguf`` file.

    Returns
    -------
    LanguageModel
        On the CPU, and from GGUF files, the model is float32; else as it was saved. Its cache is
        bfloat16 if the model was saved in that, else float16.

    Raises
    ------
    OSError, ValueError
        From transformers, if there is no such model, or none it knows.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        where, options, saved = str(path.parent), {"gguf_file": path.name}, torch.float32
    else:
        where, options = str(source), {}
        saved = AutoConfig.from_pretrained(where).dtype
    gpu = torch.cuda.is_available()
    dtype = "auto" if gpu and not options else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    cache_dtype = "bfloat16" if saved == torch.bfloat16 else "float16"
    return LanguageModel(model.eval().to("cuda" if gpu else "cpu"), tokenizer, cache_dtype)


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
    with torch.no_grad(), record_attention(lm.model, lambda call: _keep(calls, call)):
        output = lm.model.base_model(_batch(lm, tokens), use_cache=True)
    kept = _of_layers(calls, cached_kv(output.past_key_values))
    return {layer: (call.key, call.value, call.query) for layer, call in kept.items()}


def span_layers(lm: LanguageModel, /) -> dict[int, tuple[SpanLayer, int | None]]:
    """What spans must know of the layers that have a cache, and their sliding windows, if any.

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
        output = lm.model.base_model(_batch(lm, [0]), use_cache=True)
    cache, found = output.past_key_values, {}
    for place, (index, (k, v)) in enumerate(cached_kv(cache).items()):
        rope = RoPE.from_config(lm.model.config, layer=index)
        window = getattr(cache.layers[index], "sliding_window", None)
        found[place] = SpanLayer(k.shape[1], k.shape[3], v.shape[3], rope), window
    return found


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
        self._scored = _batch(lm, tokens[prefix:-1])
        self._next = torch.as_tensor(tokens[prefix + 1 :], device=lm.model.device)[:, None]
        with torch.no_grad():
            read = lm.model.base_model(_batch(lm, tokens[:prefix]), use_cache=True)
        self._cache = read.past_key_values
        self.kv: KV = {
            layer: (cast(k, dtype=lm.cache_dtype), cast(v, dtype=lm.cache_dtype))
            for layer, (k, v) in cached_kv(self._cache).items()
        }
        self.partial = frozenset(i for i, (k, _) in self.kv.items() if k.shape[-2] < prefix)
        calls: dict[int, AttentionCall] = {}
        with record_attention(lm.model, lambda call: _keep(calls, call)):
            self._original = self._continue(self.kv)
        self._calls = _of_layers(calls, self.kv)
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


def _keep(calls: dict[int, AttentionCall], call: AttentionCall) -> None:
    calls[call.layer] = call


def _of_layers(calls: Mapping[int, AttentionCall], kv: KV) -> dict[int, AttentionCall]:
    missing = [layer for layer in kv if layer not in calls]
    if missing:
        raise UnsupportedModel(
            f"layers {missing} have a cache, but do not attend through the attention interface "
            "of transformers"
        )
    return {layer: calls[layer] for layer in kv}


def _batch(lm: LanguageModel, tokens: HostArray | Sequence[int]) -> Tensor:
    return torch.as_tensor(tokens, device=lm.model.device)[None]
