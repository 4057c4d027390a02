"""What errors of a row do to a model: a square root of their weights, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace
from kvcompress.cross_layer.layer_group import LayerGroup

NOISE = 0.05
"""Share by which weights off the diagonal are reduced, as noise."""

DAMPED = 0.7
"""Power to which the relative weights of layers and groups are raised: they differ by factors of
hundreds, between texts too."""

FLOOR = 2.0**-24
"""Least weight, over the mean of all: others have no root in float16 that can be inverted."""

LEAST = 1e-3
"""Least weight, over the mean of a head: a later query may read what none has read so far."""


@dataclass(frozen=True, eq=False)
class Metric:
    """Symmetric matrices that take the numbers of every head to where all errors count alike.

    Attributes
    ----------
    group : LayerGroup
    roots : array ``[matrix_numbers(group)]``, float32
        Of every layer: ``[heads, key_dim, key_dim]``, ``[heads, value_dim, value_dim]``, and
        ``[heads, 1, 1]`` for the logarithms of the norms.
    weight : float
        Mean weight of all numbers, damped, which was taken out of the roots.
    """

    group: LayerGroup
    roots: HostArray
    weight: float = 1.0

    @property
    def layers(self) -> list[list[HostArray]]:
        """The three arrays of matrices of every layer."""
        return split_matrices(self.group, self.roots)

    def apply(self, rows: HostArray, /) -> HostArray:
        """Weigh rows ``[rows, width]``, float32."""
        pairs = zip(self.group.columns, self.layers, strict=True)
        return np.concatenate([weigh_layer(rows[:, c], layer) for c, layer in pairs], axis=1)

    def sandwich(self, covariance: HostArray, /) -> HostArray:
        """Covariance ``[width, width]`` of weighed rows, from that of rows."""
        return self.apply(np.ascontiguousarray(self.apply(covariance).T))

    def inverse(self) -> Metric:
        """The metric that undoes this one."""
        inverses = [np.linalg.inv(x).ravel() for layer in self.layers for x in layer]
        return Metric(self.group, np.concatenate(inverses))


def matrix_numbers(group: LayerGroup) -> int:
    """Numbers of one square matrix for every head, of keys, of values and of logarithms."""
    return sum(heads * dim * dim for shape in group.shapes for heads, dim in shape.groups)


def split_matrices(group: LayerGroup, flat: HostArray) -> list[list[HostArray]]:
    """Arrays of matrices ``[heads, dim, dim]`` of every layer: views of all their numbers."""
    layers, at = [], 0
    for shape in group.shapes:
        layer = []
        for heads, dim in shape.groups:
            layer.append(flat[at : at + heads * dim * dim].reshape(heads, dim, dim))
            at += heads * dim * dim
        layers.append(layer)
    return layers


def weigh_layer(rows: Array, matrices: Sequence[Array]) -> Array:
    """Weigh rows ``[rows, width of a layer]``, float32, by the matrices of that layer."""
    xp = array_namespace(rows)
    weighed, at = [], 0
    for matrix in matrices:
        heads, dim, _ = matrix.shape
        x = xp.reshape(rows[:, at : at + heads * dim], (-1, heads, dim))
        x = xp.permute_dims(xp.permute_dims(x, (1, 0, 2)) @ matrix, (1, 0, 2))
        weighed.append(xp.reshape(x, (-1, heads * dim)))
        at += heads * dim
    return xp.concat(weighed, axis=1)


def metric_of(group: LayerGroup, moments: HostArray | None) -> Metric:
    """Metric of second moments of gradients, float64, as many as `matrix_numbers`.

    Without moments, errors of all keys count alike, as do relative ones of all values.
    """
    if moments is None:
        ones = [
            np.broadcast_to(np.eye(dim), (heads, dim, dim)) * weight
            for shape in group.shapes
            for (heads, dim), weight in zip(
                shape.groups, (1 / shape.key_dim, 1, np.log(2) ** 2), strict=True
            )
        ]
        moments = np.concatenate([x.ravel() for x in ones])
    layers = split_matrices(group, moments)
    sizes = np.array([[np.trace(x, 0, 1, 2).mean() for x in layer[:2]] for layer in layers])
    damping = np.maximum(sizes, 1e-30) ** (DAMPED - 1)
    damping /= np.exp(np.mean(np.log(damping), axis=0))
    damped = [
        x * factor
        for layer, (keys, values) in zip(layers, damping, strict=True)
        for x, factor in zip(layer, (keys, values, values), strict=True)
    ]
    total = sum(float(np.trace(x, 0, 1, 2).sum()) for x in damped)
    roots = [_root(x, max(FLOOR * total / group.width, 1e-33)) for x in damped]
    flat = np.concatenate([x.ravel() for x in roots])
    weight = float(np.sum(flat * flat)) / group.width
    return Metric(group, (flat / np.sqrt(weight)).astype(np.float32), weight**DAMPED)


def _root(moments: HostArray, floor: float) -> HostArray:
    """Symmetric square roots of moments ``[heads, dim, dim]``, with care for their noise."""
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    least = np.maximum(LEAST * diagonal.mean(1, keepdims=True), floor)
    noise = np.eye(moments.shape[1]) * (NOISE * diagonal + least)[:, None]
    values, vectors = np.linalg.eigh((1 - NOISE) * moments + noise)
    values = np.sqrt(np.maximum(values, least))
    root: HostArray = (vectors * values[:, None]) @ np.swapaxes(vectors, 1, 2)
    return root
