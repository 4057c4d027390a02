"""The operations as kernel launches, whatever runs them: CuPy or, in tests, an emulator."""

from kvcompress_cupy.operations.affine import Affine
from kvcompress_cupy.operations.allocated import Allocated
from kvcompress_cupy.operations.base import Runtime
from kvcompress_cupy.operations.clipping import Clipping
from kvcompress_cupy.operations.codebooks import Codebooks
from kvcompress_cupy.operations.pools import Pools
from kvcompress_cupy.operations.rotated import Rotated

__all__ = ["Operations", "Runtime"]


class Operations(Affine, Clipping, Rotated, Codebooks, Allocated, Pools):
    """All of them.

    Parameters
    ----------
    runtime : Runtime
    """
