"""Caches that the compressor reads from and writes to; they know nothing of it."""

from kvcompress.caches.latent_attention import MultiHeadLatentAttention
from kvcompress.caches.mla import MlaCompressedKVCache
from kvcompress.caches.paged import PagedKVCache
from kvcompress.caches.per_head import PerHeadLatentAttention

__all__ = [
    "MlaCompressedKVCache",
    "MultiHeadLatentAttention",
    "PagedKVCache",
    "PerHeadLatentAttention",
]
