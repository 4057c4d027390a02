"""`CrossLayerCalibration`: statistics of the layer groups of a model, and training on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from kvcompress.arrays import Array, HostArray, digest
from kvcompress.cross_layer.layer_group import LayerGroup
from kvcompress.cross_layer.statistics import ROWS, LayerGroupStatistics
from kvcompress.cross_layer.training import LayerGroupBasis, fit_basis, train_layer_groups
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.errors import SettingError, UnknownLayer
from kvcompress.files import (
    Facts,
    flatten,
    load_arrays,
    reading,
    require,
    save_arrays,
    unflatten,
)

FORMAT = "kvcompress.cross-layer-calibration.4"

MAX_WIDTH = 12288
"""Default for the most numbers of a token in one layer group: 600 MB of covariance."""


def layer_groups(
    layers: Mapping[int, tuple[Any, Any]], /, *, max_width: int = MAX_WIDTH
) -> tuple[LayerGroup, ...]:
    """Put layers that hold the same tokens into layer groups.

    Parameters
    ----------
    layers : mapping of layer to a `LayerShape` and a hashable
        Layers with equal hashables, such as their windows, hold the same tokens.
    max_width : int
        Layers that together are wider make several groups of neighbours, of about equal width.

    Returns
    -------
    tuple of LayerGroup

    Raises
    ------
    SettingError
        If a single layer is wider.
    """
    by_kind: dict[Any, list[int]] = {}
    for layer, (_, kind) in sorted(layers.items()):
        by_kind.setdefault(kind, []).append(layer)
    groups = []
    for same in by_kind.values():
        widths = [layers[layer][0].width for layer in same]
        if max(widths) > max_width:
            raise SettingError(f"a layer is {max(widths)} wide, more than max_width {max_width}")
        parts = -(-sum(widths) // max_width)
        while any(sum(part) > max_width for part in np.array_split(widths, parts)):
            parts += 1
        for part in np.array_split(same, parts):
            inside = tuple(int(layer) for layer in part)
            groups.append(LayerGroup(inside, tuple(layers[layer][0] for layer in inside)))
    return tuple(groups)


class CrossLayerCalibration:
    """Statistics of the layer groups of a model; see `LayerGroupStatistics`.

    Parameters
    ----------
    groups : sequence of LayerGroup
        Each layer in one of them.
    rows, skip, seed : int
        Of every `LayerGroupStatistics`.

    Attributes
    ----------
    statistics : tuple of LayerGroupStatistics
    provenance : dict
        What the tokens are from, whatever JSON can hold: saved, but no part of the fingerprint.
    """

    def __init__(
        self, groups: Sequence[LayerGroup], *, rows: int = ROWS, skip: int = 4, seed: int = 0
    ) -> None:
        self.statistics = tuple(
            LayerGroupStatistics(s, rows=rows, skip=skip, seed=seed) for s in groups
        )
        self.provenance: dict[str, Any] = {}
        self._bases: dict[int, LayerGroupBasis] = {}

    def __repr__(self) -> str:
        widths = ", ".join(str(s.group.width) for s in self.statistics)
        return f"CrossLayerCalibration({self.tokens:,} tokens, layer groups of {widths})"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of all layer groups."""
        return tuple(sorted(i for s in self.statistics for i in s.group.layers))

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return min((s.tokens for s in self.statistics), default=0)

    @property
    def weighed(self) -> int:
        """Tokens of which gradients were seen."""
        return min((s.weighed for s in self.statistics), default=0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all statistics, in hexadecimal."""
        return digest(self._arrays)

    def update(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        gradients: tuple[Sequence[Array], Sequence[Array]] | None = None,
        /,
    ) -> None:
        """Add the tokens of whole sequences: see `LayerGroupStatistics.update`.

        Parameters
        ----------
        keys, values : sequences of arrays
            One for every layer of the model.
        gradients : pair of sequences of arrays, optional

        Raises
        ------
        UnknownLayer
            If a layer of a layer group is missing; and the errors of `LayerGroupStatistics.update`.
        """
        for statistics in self.statistics:
            layers = statistics.group.layers
            given = (keys, values, *(gradients or ()))
            if any(len(xs) <= layers[-1] for xs in given):
                counts = ", ".join(str(len(xs)) for xs in given)
                raise UnknownLayer(f"layer {layers[-1]} is missing, there are {counts}")
            k, v, *rest = ([xs[i] for i in layers] for xs in given)
            statistics.update(k, v, (rest[0], rest[1]) if rest else None)
        self._bases.clear()

    def train(self, bits: float, /) -> CrossLayerTransform:
        """Train all layer groups to spend `bits` per value together; see `train_layer_groups`.

        Parameters
        ----------
        bits : float

        Raises
        ------
        SettingError
            As `train_layer_group`.
        """
        for i, s in enumerate(self.statistics):
            if i not in self._bases:
                self._bases[i] = fit_basis(s)
        bases = [self._bases[i] for i in range(len(self.statistics))]
        return CrossLayerTransform(train_layer_groups(self.statistics, bits, bases))

    def save(self, path: str | PathLike[str], /) -> None:
        """Write a safetensors file, wholly or not at all.

        Raises
        ------
        FileError
            If it cannot be written.
        CalibrationError
            If JSON cannot hold the provenance.
        """
        facts = {"groups": [s.facts for s in self.statistics], "provenance": self.provenance}
        save_arrays(path, self._arrays, form=FORMAT, facts=facts)

    @classmethod
    def load(cls, path: str | PathLike[str], /) -> CrossLayerCalibration:
        """Read a file that `save` wrote.

        Raises
        ------
        FileError
            If there is no such file, or it cannot be read.
        CalibrationError
            If it is not such a file, or damaged.
        """
        with reading(path, "a calibration of layer groups"):
            arrays, held = load_arrays(path, form=FORMAT)
            facts, known = Facts(held, "facts", "groups", "provenance"), unflatten(arrays)
            groups = facts.objects("groups", "group", "settings", "tokens", "weighed")
            require(
                set(known) == {str(i) for i in range(len(groups))},
                f"there must be arrays of {len(groups)} groups, got {list(known)}",
            )
            calibration = cls(())
            calibration.provenance = facts.object("provenance").plain
            calibration.statistics = tuple(
                LayerGroupStatistics.of(of_group, known[str(i)])
                for i, of_group in enumerate(groups)
            )
            layers = [i for s in calibration.statistics for i in s.group.layers]
            require(len(set(layers)) == len(layers), f"a layer is in two groups: {layers}")
        return calibration

    @property
    def _arrays(self) -> dict[str, HostArray]:
        return flatten({i: s.arrays for i, s in enumerate(self.statistics)})
