"""From one floating dtype to another, which every method begins or ends with."""

from __future__ import annotations

from kvcompress.arrays import FLOAT16_MAX, Array, array_namespace, astype, dtype_name


def cast(x: Array, *, dtype: str) -> Array:
    """Cast, but what exceeds float16 becomes its largest instead of infinite.

    Parameters
    ----------
    x : array, floating
    dtype : {"float16", "bfloat16", "float32"}

    Returns
    -------
    array of `dtype`, of the shape of `x`
        `x` itself if it has that dtype.
    """
    if dtype == "float16" != dtype_name(x.dtype):
        x = astype(x, "float32")
        x = array_namespace(x).clip(x, -FLOAT16_MAX, FLOAT16_MAX)
    return astype(x, dtype)
