"""Compression of transformer KV caches on any array library."""

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
    "NamespaceError",
    "NonFiniteError",
    "OutOfBlocks",
    "SequenceExists",
    "SettingError",
    "ShapeError",
    "TensorSpec",
    "UnknownLayer",
    "UnknownSequence",
    "VectorQuantization",
    "__version__",
]
