"""Models of Hugging Face transformers: what they read of a text, and caches that hold other keys.

Needs the extra ``hf``.
"""

from kvcompress.integrations.transformers.attention import AttentionCall, record_attention
from kvcompress.integrations.transformers.cache import KV, cached_kv, replace_kv
from kvcompress.integrations.transformers.capture import capture, layer_shapes
from kvcompress.integrations.transformers.gradients import cache_gradients
from kvcompress.integrations.transformers.models import LanguageModel, load_model

__all__ = [
    "KV",
    "AttentionCall",
    "LanguageModel",
    "cache_gradients",
    "cached_kv",
    "capture",
    "layer_shapes",
    "load_model",
    "record_attention",
    "replace_kv",
]
