"""Pure functions over any Array API namespace: the codec's building blocks.

Each is the generic form of an operation that a backend may take over, and what every kernel is
tested against.
"""

from kvcompress.ops.affine import AffineSpec, dequantize, quantize
from kvcompress.ops.kmeans import kmeans, lookup, nearest
from kvcompress.ops.outliers import gather_rows, largest, put_rows
from kvcompress.ops.packing import pack, packed_size, unpack
from kvcompress.ops.pca import Principal, center, principal_components, reconstruct, variances

__all__ = [
    "AffineSpec",
    "Principal",
    "center",
    "dequantize",
    "gather_rows",
    "kmeans",
    "largest",
    "lookup",
    "nearest",
    "pack",
    "packed_size",
    "principal_components",
    "put_rows",
    "quantize",
    "reconstruct",
    "unpack",
    "variances",
]
