"""Compression of transformer KV caches on any array library.

What most programs need is here; errors are in `kvcompress.errors`, the operations in
`kvcompress.ops`, and what is trained across layers in `kvcompress.cross_layer`.
"""

from kvcompress.caches import (
    MlaCompressedKVCache,
    MultiHeadLatentAttention,
    PagedKVCache,
    PerHeadLatentAttention,
)
from kvcompress.calibration import Calibration
from kvcompress.compressed import CompressedCache, CompressedKV, KVLayout
from kvcompress.compressor import KVCacheCompressor
from kvcompress.cross_layer import CrossLayerCalibration, CrossLayerTransform
from kvcompress.errors import KVCompressError
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
    "Calibration",
    "CompressedCache",
    "CompressedKV",
    "CrossLayerCalibration",
    "CrossLayerTransform",
    "GroupQuantization",
    "Hybrid",
    "KVCacheCompressor",
    "KVCompressError",
    "KVLayout",
    "LowRank",
    "Method",
    "MlaCompressedKVCache",
    "MultiHeadLatentAttention",
    "PagedKVCache",
    "PerHeadLatentAttention",
    "Plan",
    "RoPE",
    "RotatedQuantization",
    "TensorSpec",
    "TransformCoding",
    "VectorQuantization",
    "__version__",
    "plan",
]
