"""What attention is given in the layers of a model of transformers, recorded as the model runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.errors import UnsupportedModel


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What attention was given in one layer.

    Attributes
    ----------
    layer : int
    query : Tensor ``[batch, num_query_heads, queries, head_dim]``
        After RoPE, and scaled so that the logits are ``query @ key.T / sqrt(head_dim)``.
    key, value : Tensors ``[batch, num_heads, tokens, head_dim]``
        After RoPE; all that the queries may read.
    attend : callable
        From key and value to the model's own attention output, float32
        ``[batch, queries, num_query_heads, head_dim]``, for the same queries and mask.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    attend: Callable[[Tensor, Tensor], Tensor]


_record: ContextVar[Callable[[AttentionCall], None] | None] = ContextVar("record", default=None)

_one = RLock()
"""Held while recording, which sets the attention of a model for all threads."""


@contextmanager
def record_attention(model: Any, record: Callable[[AttentionCall], None], /) -> Iterator[None]:
    """Call `record` whenever a layer of `model` attends in this thread.

    Threads record one after the other; those that only run the model need not wait.

    Raises
    ------
    UnsupportedModel
        If the model attends in another way than "sdpa" or "eager", or not through the attention
        interface of transformers.
    """
    with _one:
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"the model attends by {implementation!r}; load it with attn_implementation "
                '"sdpa" or "eager"'
            )
        token = _record.set(record)
        model.set_attn_implementation(_recording(implementation))
        try:
            yield
        finally:
            model.set_attn_implementation(implementation)
            _record.reset(token)


def _recording(implementation: str) -> str:
    """Register, and name, the attention that does what `implementation` does, and records it."""
    name = f"kvcompress_{implementation}"

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        # Every model has its own "eager", next to its layers.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        original = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)

        def again(key: Tensor, value: Tensor) -> Tensor:
            wide = mask.float() if mask is not None and mask.is_floating_point() else mask
            tensors = (x.float() for x in (query, key, value))
            return original(module, *tensors, wide, **options)[0]

        record = _record.get()
        if record is not None:
            head_dim = query.shape[-1]
            scale = (options.get("scaling") or head_dim**-0.5) * math.sqrt(head_dim)
            record(AttentionCall(module.layer_idx, query * scale, key, value, again))
        return original(module, query, key, value, mask, **options)

    AttentionInterface.register(name, attend)
    # Without its mask, attention over a cache would be causal from the wrong token on.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name
