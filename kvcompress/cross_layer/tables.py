"""Parameters on a device: matrices that take rows to coefficients and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcompress.arrays import Array, HostArray, Namespace, array_namespace, kept
from kvcompress.cross_layer.metric import weigh_layer
from kvcompress.cross_layer.parameters import CrossLayerParameters

_CLIPPED = 2.0**50
"""Rows are clipped to this, where only their coefficients are computed from it."""


@dataclass(frozen=True, eq=False)
class Forward:
    """What takes rows to coefficients, on the device, and back to find the residual."""

    mean: Array
    metric: Sequence[Sequence[Array]]
    matrix: Array
    importance: Array
    thresholds: Array
    backward: Backward


@dataclass(frozen=True, eq=False)
class Backward:
    """What takes coefficients to rows, on the device."""

    parameters: CrossLayerParameters
    mean: Array
    metric: Sequence[Sequence[Array]]
    matrix: Array
    centres: tuple[Array, Array]


@kept(maxsize=8)
def backward_tables(parameters: CrossLayerParameters, xp: Namespace, where: Any) -> Backward:
    """Tables of parameters on a device, to restore rows."""

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    one, more = (move(centre[parameters.classes]) for centre in parameters.centres)
    inverse = [
        [move(x * parameters.step) for x in layer] for layer in parameters.metric.inverse().layers
    ]
    return Backward(
        parameters, move(parameters.mean), inverse, move(parameters.backward), (one, more)
    )


@kept(maxsize=8)
def forward_tables(parameters: CrossLayerParameters, xp: Namespace, where: Any) -> Forward:
    """Tables of parameters on a device, to encode rows."""

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    mean = move(parameters.mean)
    return Forward(
        mean,
        [[move(x / parameters.step) for x in layer] for layer in parameters.metric.layers],
        move(parameters.forward),
        move(parameters.importance),
        move(parameters.rounding[parameters.classes]),
        backward_tables(parameters, like=mean),
    )


def weighed(tables: Forward, rows: Array) -> Array:
    """Rows less the mean of the calibration, weighed, in steps."""
    xp, group = array_namespace(rows), tables.backward.parameters.group
    parts = [
        weigh_layer(xp.clip(rows[:, c], -_CLIPPED, _CLIPPED) - tables.mean[c], matrices)
        for c, matrices in zip(group.columns, tables.metric, strict=True)
    ]
    return xp.concat(parts, axis=1)
