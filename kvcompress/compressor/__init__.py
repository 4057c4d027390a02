"""`KVCacheCompressor`: validate, set exact tokens aside, delegate to the methods, and join."""

from kvcompress.compressor.compressor import KVCacheCompressor

__all__ = [
    "KVCacheCompressor",
]
