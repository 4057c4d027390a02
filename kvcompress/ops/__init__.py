"""Pure functions over any Array API namespace: the codec's building blocks.

Those with the decorator `operation` are the generic form of what a backend may take over, which
every kernel is tested against; `OPERATIONS` lists them.
"""

from kvcompress.ops.affine import AffineSpec, dequantize, quantize
from kvcompress.ops.allocated import allocate, dequantize_allocated, quantize_allocated
from kvcompress.ops.bounds import within
from kvcompress.ops.casting import cast
from kvcompress.ops.channels import channel_reference, normalize_channels, restore_channels
from kvcompress.ops.clipping import clip_groups
from kvcompress.ops.hadamard import hadamard, inverse_hadamard
from kvcompress.ops.kmeans import kmeans, lookup, nearest
from kvcompress.ops.outliers import gather_rows, largest, put_rows
from kvcompress.ops.packing import pack, packed_size, unpack
from kvcompress.ops.pca import Principal, center, principal_components, reconstruct, variances
from kvcompress.ops.product import decode_product, encode_product
from kvcompress.ops.registry import OPERATIONS, operation
from kvcompress.ops.rotated import RotatedSpec, dequantize_rotated, quantize_rotated
from kvcompress.ops.slots import Paged, gather_slots, scatter_slots

__all__ = [
    "OPERATIONS",
    "AffineSpec",
    "Paged",
    "Principal",
    "RotatedSpec",
    "allocate",
    "cast",
    "center",
    "channel_reference",
    "clip_groups",
    "decode_product",
    "dequantize",
    "dequantize_allocated",
    "dequantize_rotated",
    "encode_product",
    "gather_rows",
    "gather_slots",
    "hadamard",
    "inverse_hadamard",
    "kmeans",
    "largest",
    "lookup",
    "nearest",
    "normalize_channels",
    "operation",
    "pack",
    "packed_size",
    "principal_components",
    "put_rows",
    "quantize",
    "quantize_allocated",
    "quantize_rotated",
    "reconstruct",
    "restore_channels",
    "scatter_slots",
    "unpack",
    "variances",
    "within",
]
