"""Compression of transformer KV caches on any array library."""

from kvcompress.caches import MlaCompressedKVCache, MultiHeadLatentAttention, PagedKVCache
from kvcompress.calibration import Calibration
from kvcompress.compressed import CompressedKV, CompressedTensor, KVLayout
from kvcompress.compressor import KVCacheCompressor
from kvcompress.errors import (
    BackendError,
    BackendWarning,
    CalibrationError,
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
    UnsupportedModel,
)
from kvcompress.methods import (
    GroupQuantization,
    Hybrid,
    LowRank,
    Method,
    RotatedQuantization,
    TensorSpec,
    TransformCoding,
    VectorQuantization,
)
from kvcompress.plan import Plan, plan
from kvcompress.rope import RoPE

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendWarning",
    "Calibration",
    "CalibrationError",
    "CompressedKV",
    "CompressedTensor",
    "DTypeError",
    "GroupQuantization",
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
    "Plan",
    "RoPE",
    "RotatedQuantization",
    "SequenceExists",
    "SettingError",
    "ShapeError",
    "TensorSpec",
    "TransformCoding",
    "UnknownLayer",
    "UnknownSequence",
    "UnsupportedModel",
    "VectorQuantization",
    "__version__",
    "plan",
]
