"""What compression returns: frozen containers that know their layout and their bytes."""

from kvcompress.compressed.cache import CompressedCache, CompressedLayerGroup
from kvcompress.compressed.kv import CompressedKV, CompressedTensor, KVLayout, Positions

__all__ = [
    "CompressedCache",
    "CompressedKV",
    "CompressedLayerGroup",
    "CompressedTensor",
    "KVLayout",
    "Positions",
]
