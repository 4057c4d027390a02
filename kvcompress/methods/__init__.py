"""Compression methods, one file each."""

from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.methods.group_quantization import GroupQuantization
from kvcompress.methods.hybrid import Hybrid
from kvcompress.methods.low_rank import LowRank
from kvcompress.methods.rotated_quantization import RotatedQuantization
from kvcompress.methods.transform_coding import TransformCoding
from kvcompress.methods.vector_quantization import VectorQuantization

__all__ = [
    "GroupQuantization",
    "Hybrid",
    "LowRank",
    "Method",
    "Payload",
    "Role",
    "RotatedQuantization",
    "TensorSpec",
    "TransformCoding",
    "VectorQuantization",
]
