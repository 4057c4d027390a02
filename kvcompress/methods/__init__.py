"""Compression methods, one file each."""

from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.methods.hybrid import Hybrid
from kvcompress.methods.low_rank import LowRank
from kvcompress.methods.vector_quantization import VectorQuantization

__all__ = [
    "Hybrid",
    "LowRank",
    "Method",
    "Payload",
    "Role",
    "TensorSpec",
    "VectorQuantization",
]
