"""What a span code is on a device: matrices that take rows to coefficients and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvcompress._namespace import Array, Namespace, array_namespace
from kvcompress.layer_statistics import HostArray
from kvcompress.spans.code import SpanCode
from kvcompress.spans.metric import weigh_layer

_CLIPPED = 2.0**50
"""Rows are clipped to this, where only their coefficients are computed from it."""


@dataclass(frozen=True, eq=False)
class Forward:
    """What takes rows to coefficients, on the device, and back to see what is left."""

    mean: Array
    metric: Sequence[Sequence[Array]]
    matrix: Array
    importance: Array
    thresholds: Array
    backward: Backward


@dataclass(frozen=True, eq=False)
class Backward:
    """What takes coefficients to rows, on the device."""

    code: SpanCode
    mean: Array
    metric: Sequence[Sequence[Array]]
    matrix: Array
    centres: tuple[Array, Array]


@lru_cache(maxsize=8)
def backward_tables(code: SpanCode, xp: Namespace, where: Any) -> Backward:
    """Tables of a code on a device, to restore rows."""

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    one, more = (move(centre[code.classes]) for centre in code.centres)
    inverse = [[move(x * code.step) for x in layer] for layer in code.metric.inverse().layers]
    return Backward(code, move(code.mean), inverse, move(code.backward), (one, more))


@lru_cache(maxsize=8)
def forward_tables(code: SpanCode, xp: Namespace, where: Any) -> Forward:
    """Tables of a code on a device, to encode rows."""

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    return Forward(
        move(code.mean),
        [[move(x / code.step) for x in layer] for layer in code.metric.layers],
        move(code.forward),
        move(code.importance),
        move(code.rounding[code.classes]),
        backward_tables(code, xp, where),
    )


def weighed(tables: Forward, rows: Array) -> Array:
    """Rows less the mean of the calibration, weighed, in steps."""
    xp, span = array_namespace(rows), tables.backward.code.span
    parts = [
        weigh_layer(xp.clip(rows[:, c], -_CLIPPED, _CLIPPED) - tables.mean[c], matrices)
        for c, matrices in zip(span.columns, tables.metric, strict=True)
    ]
    return xp.concat(parts, axis=1)
