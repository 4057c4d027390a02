"""Compression of transformer KV caches on any array library."""

from kvcompress.caches import MlaCompressedKVCache, MultiHeadLatentAttention, PagedKVCache
from kvcompress.compressed import CompressedKV, CompressedTensor, KVLayout
from kvcompress.compressor import KVCacheCompressor
from kvcompress.errors import (
    BackendError,
    BackendWarning,
    DTypeError,
    KVCompressError,
    LayoutError,
    NamespaceError,
    NonFiniteError,
    OutOfBlocks,
    SequenceExists,
    SettingError,
    ShapeError,
    UnknownLayer,
    UnknownSequence,
)
from kvcompress.methods import Hybrid, LowRank, Method, TensorSpec, VectorQuantization
from kvcompress.rope import RoPE

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendWarning",
    "CompressedKV",
    "CompressedTensor",
    "DTypeError",
    "Hybrid",
    "KVCacheCompressor",
    "KVCompressError",
    "KVLayout",
    "LayoutError",
    "LowRank",
    "Method",
    "MlaCompressedKVCache",
    "MultiHeadLatentAttention",
    "NamespaceError",
    "NonFiniteError",
    "OutOfBlocks",
    "PagedKVCache",
    "RoPE",
    "SequenceExists",
    "SettingError",
    "ShapeError",
    "TensorSpec",
    "UnknownLayer",
    "UnknownSequence",
    "VectorQuantization",
    "__version__",
]
