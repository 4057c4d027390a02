"""From one floating dtype to another, which every method begins or ends with."""

from __future__ import annotations

from collections.abc import Iterator

from kvcompress.arrays import FLOAT16_MAX, FLOATING, Array, array_namespace, astype, dtype_name
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import operation


def _examples(inputs: Inputs) -> Iterator[Call]:
    others = [dtype for dtype in ("float16", "float32") if dtype != inputs.dtype]
    for dtype in inputs.choose(every=FLOATING, usual=others):
        yield Call((inputs.tensor(),), {"dtype": dtype}, f"to {dtype}")


@operation(_examples)
def cast(x: Array, *, dtype: str) -> Array:
    """Cast to another dtype; what exceeds float16 becomes its largest instead of infinite.

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
