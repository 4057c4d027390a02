"""`cast` of `kvcompress.ops`."""

from __future__ import annotations

from typing import Any

from kvcompress_numba.arrays import NDArray, Rows, empty, fold, following, rows
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import kernel, run
from kvcompress_numba.vectors import get, load, narrow


def cast(x: NDArray, *, dtype: str) -> NDArray:
    """See `kvcompress.ops.cast`."""
    heads, tokens, channels = fold(x.shape)
    out, flat = empty(x.shape, dtype)
    run(_cast, heads * tokens, channels, 0, rows(x), tokens, channels, flat)
    return out


@kernel
def _cast(x: Rows, tokens: int, channels: int, out: Any, _: Any, begin: int, end: int) -> None:
    """One unit a row."""
    flat, head, token = x
    vectors = channels & -LANES
    h, t = begin // tokens, begin % tokens
    for unit in range(begin, end):
        first, at = h * head + t * token, unit * channels
        h, t = following(h, t, tokens)
        for i in range(0, vectors, LANES):
            narrow(out, at + i, load(flat, first + i))
        for i in range(vectors, channels):
            narrow(out, at + i, get(flat, first + i))
