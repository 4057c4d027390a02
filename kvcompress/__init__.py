"""Compression of transformer KV caches on any array library."""

from kvcompress.caches import MlaCompressedKVCache, MultiHeadLatentAttention, PagedKVCache
from kvcompress.calibration import Calibration
from kvcompress.compressed import CompressedKV, CompressedTensor, KVLayout
from kvcompress.compressed_cache import CompressedCache, CompressedSpan
from kvcompress.compressor import KVCacheCompressor
from kvcompress.errors import (
    BackendError,
    BackendWarning,
    CalibrationError,
    CodingError,
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
    SpanTransform,
    TensorSpec,
    TransformCoding,
    VectorQuantization,
)
from kvcompress.plan import Plan, plan
from kvcompress.rope import RoPE
from kvcompress.span_calibration import SpanCalibration, spans_of
from kvcompress.spans.code import SpanCode
from kvcompress.spans.span import Span, SpanLayer
from kvcompress.spans.statistics import SpanStatistics
from kvcompress.spans.training import span_basis, train_span

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendWarning",
    "Calibration",
    "CalibrationError",
    "CodingError",
    "CompressedCache",
    "CompressedKV",
    "CompressedSpan",
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
    "Span",
    "SpanCalibration",
    "SpanCode",
    "SpanLayer",
    "SpanStatistics",
    "SpanTransform",
    "TensorSpec",
    "TransformCoding",
    "UnknownLayer",
    "UnknownSequence",
    "UnsupportedModel",
    "VectorQuantization",
    "__version__",
    "plan",
    "span_basis",
    "spans_of",
    "train_span",
]
