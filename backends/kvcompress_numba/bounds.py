"""`within` of `kvcompress.ops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcompress_numba.arrays import NDArray, Rows, fold, following, rows
from kvcompress_numba.intrinsics import LANES
from kvcompress_numba.threads import kernel, run
from kvcompress_numba.vectors import (
    absolute,
    get,
    load,
    splat,
    splat_int,
    total,
    where_not_less,
)


def within(x: NDArray, *, limit: float) -> Any:
    """See `kvcompress.ops.within`."""
    heads, tokens, channels = fold(x.shape)
    beyond = np.zeros(heads * tokens, np.uint8)
    run(_within, heads * tokens, channels, 0, rows(x), tokens, channels, np.float32(limit), beyond)
    return ~beyond.any()


@kernel
def _within(
    x: Rows, tokens: int, channels: int, limit: Any, beyond: Any, _: Any, begin: int, end: int
) -> None:
    """One unit a row; only the first says what was found, for all."""
    flat, head, token = x
    vectors = channels & -LANES
    most, no, yes = splat(limit), splat_int(0), splat_int(1)
    found, more = no, False
    h, t = begin // tokens, begin % tokens
    for _unit in range(begin, end):
        first = h * head + t * token
        h, t = following(h, t, tokens)
        for i in range(first, first + vectors, LANES):
            found = found | where_not_less(most, absolute(load(flat, i)), no, yes)
        for i in range(first + vectors, first + channels):
            more |= not abs(get(flat, i)) <= limit
    beyond[begin] = more or total(found) > 0
