"""How far the predictions of a model of transformers move with errors of its cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcompress.arrays import HostArray
from kvcompress.integrations.transformers.cache import cached_kv, replace_kv
from kvcompress.integrations.transformers.models import LanguageModel

READ = 0.75
"""Share of a text that is in the cache when the rest is predicted from it."""

RECENT = 0.0625
"""Share of a text, at the end of the cache, of which gradients are not taken: the next tokens read
it far more than they will when it is old."""


def cache_gradients(
    lm: LanguageModel, tokens: HostArray, /, *, seed: int = 0
) -> dict[int, tuple[Tensor, Tensor]]:
    """Gradients of a log-likelihood by a cache that is held as it is.

    The model reads most of a text, and predicts the rest from that cache; from each prediction a
    token is drawn, and the gradient of the log-likelihood of all of them goes back to the cache,
    but not through it: the cache of later tokens is not computed again when that of earlier ones
    is restored. Mean squares of such gradients are the Fisher information (Martens 2014,
    arXiv 1412.1193).

    Parameters
    ----------
    lm : LanguageModel
    tokens : array ``[tokens]``, int64
        Token ids; 16 at least.
    seed : int
        Of the tokens drawn.

    Returns
    -------
    dict of layer to gradients by keys and values ``[1, num_heads, tokens, head_dim]``, float32
        After RoPE. Zero for tokens that are predicted, recent, or no longer held by a layer with a
        sliding window.

    Raises
    ------
    UnsupportedModel
    """
    text = torch.as_tensor(tokens, device=lm.model.device)[None]
    read, recent = int(READ * len(tokens)), int(RECENT * len(tokens))
    with torch.no_grad():
        cache = lm.model.base_model(text[:, :read], use_cache=True).past_key_values
    leaves = {
        layer: tuple(x.detach().clone().requires_grad_() for x in pair)
        for layer, pair in cached_kv(cache).items()
    }
    with torch.enable_grad():
        held = replace_kv(cache, leaves)
        logits = lm.model(text[:, read:], past_key_values=held, use_cache=True).logits[0].float()
        drawn = draw(logits.detach(), seed)
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        flat = torch.autograd.grad(loss, [x for pair in leaves.values() for x in pair])
    found = {}
    for layer, pair in zip(leaves, zip(flat[::2], flat[1::2], strict=True), strict=True):
        found[layer] = tuple(_whole(x, len(tokens), read, recent) for x in pair)
    return found


def draw(logits: Tensor, seed: int) -> Tensor:
    """Draw a token of each of the distributions that logits ``[tokens, vocabulary]`` stand for."""
    noise = np.random.default_rng(seed).random((len(logits), 1), np.float32)
    below = torch.cumsum(torch.softmax(logits, -1), -1)
    drawn = torch.searchsorted(below, torch.as_tensor(noise, device=below.device))
    return drawn.clamp(max=logits.shape[-1] - 1)[:, 0]


def _whole(gradient: Tensor, tokens: int, read: int, recent: int) -> Tensor:
    """Gradients of all tokens, from those of the last that are held."""
    gradient = gradient[..., : gradient.shape[-2] - recent, :].float()
    before = read - recent - gradient.shape[-2]
    return torch.nn.functional.pad(gradient, (0, 0, before, tokens - read + recent))
