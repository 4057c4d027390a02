"""Compression methods, one file each; a new one is a file, and a line here or an entry point."""

from kvcompress.methods.base import Method, Payload, Role, TensorSpec, known_methods
from kvcompress.methods.cache_method import CacheMethod, known_cache_methods
from kvcompress.methods.group_quantization import GroupQuantization
from kvcompress.methods.hybrid import Hybrid
from kvcompress.methods.low_rank import LowRank
from kvcompress.methods.rotated_quantization import RotatedQuantization
from kvcompress.methods.transform_coding import TransformCoding
from kvcompress.methods.vector_quantization import VectorQuantization

__all__ = [
    "CacheMethod",
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
    "known_cache_methods",
    "known_methods",
]
