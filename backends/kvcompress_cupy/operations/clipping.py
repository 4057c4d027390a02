"""Clipped ranges: `clip_groups`."""

from __future__ import annotations

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import takes
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.clipping import LONGEST
from kvcompress_cupy.launches import affine, clipping
from kvcompress_cupy.launches.layout import CHANNELS
from kvcompress_cupy.operations.base import Kernels
from kvcompress_cupy.sources import CTYPES
from kvcompress_cupy.tables import CLIPPED_BITS


def _takes_clip_groups(x: Array, *, spec: AffineSpec) -> bool:
    *_, tokens, channels = x.shape
    dtypes = {dtype_name(x.dtype), spec.range_dtype or dtype_name(x.dtype)}
    length = channels if spec.axis == "token" else tokens
    return (
        dtypes <= set(CTYPES)
        and spec.bits in CLIPPED_BITS
        and channels <= CHANNELS
        and tokens < 2**31
        and affine.has_template(spec.group_size, length)
        and min(spec.group_size, length) <= LONGEST
    )


class Clipping(Kernels):
    """See `kvcompress.ops.clipping`."""

    @takes(_takes_clip_groups)
    def clip_groups(self, x: Array, *, spec: AffineSpec) -> Array:
        """See `kvcompress.ops.clip_groups`."""
        dtype = dtype_name(x.dtype)
        out = self._runtime.empty(x.shape, "float32", x)
        if out.size:
            width = clipping.load_bytes(spec, x.shape[-2], dtype)
            x, rows = self._rows(x)
            token = spec.axis == "token"
            launch = (clipping.clip_token if token else clipping.clip_channel)(
                rows,
                spec=spec,
                dtype=dtype,
                range_dtype=spec.range_dtype or dtype,
                aligned=rows.aligned(self._runtime.pointer(x), x.dtype.itemsize, width),
            )
            self._runtime.launch(launch, x, out)
        return out
