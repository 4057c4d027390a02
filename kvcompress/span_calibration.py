"""`SpanCalibration`: the statistics of all spans of a model, and the codes trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from kvcompress._namespace import Array
from kvcompress.errors import CalibrationError, KVCompressError, SettingError, UnknownLayer
from kvcompress.layer_statistics import digest
from kvcompress.methods.span_transform import SpanTransform
from kvcompress.spans.files import load_arrays, save_arrays
from kvcompress.spans.span import Span
from kvcompress.spans.statistics import ROWS, SpanStatistics
from kvcompress.spans.training import SpanBasis, span_basis, train_spans

FORMAT = "kvcompress.spans.span-calibration.2"

MAX_WIDTH = 12288
"""Numbers of a token in one span, where nothing else is said: 600 MB of covariance."""


def spans_of(
    layers: Mapping[int, tuple[Any, Any]], /, *, max_width: int = MAX_WIDTH
) -> tuple[Span, ...]:
    """Put layers that hold the same tokens into spans.

    Parameters
    ----------
    layers : mapping of layer to a `SpanLayer` and a hashable
        Layers with equal hashables, such as their windows, hold the same tokens.
    max_width : int
        Where more would be in one span, neighbouring layers make several of about equal width.

    Returns
    -------
    tuple of Span

    Raises
    ------
    SettingError
        If a single layer is wider.
    """
    groups: dict[Any, list[int]] = {}
    for layer, (_, kind) in sorted(layers.items()):
        groups.setdefault(kind, []).append(layer)
    spans = []
    for group in groups.values():
        widths = [layers[layer][0].width for layer in group]
        if max(widths) > max_width:
            raise SettingError(f"a layer is {max(widths)} wide, more than max_width {max_width}")
        parts = -(-sum(widths) // max_width)
        while any(sum(part) > max_width for part in np.array_split(widths, parts)):
            parts += 1
        for part in np.array_split(group, parts):
            inside = tuple(int(layer) for layer in part)
            spans.append(Span(inside, tuple(layers[layer][0] for layer in inside)))
    return tuple(spans)


class SpanCalibration:
    """Statistics of the spans of a model; see `SpanStatistics`.

    Parameters
    ----------
    spans : sequence of Span
        Each layer in one of them.
    rows, skip, seed : int
        Of every `SpanStatistics`.

    Attributes
    ----------
    statistics : tuple of SpanStatistics
    provenance : dict
        What the tokens are from, whatever JSON can hold: saved, but no part of the fingerprint.
    """

    def __init__(
        self, spans: Sequence[Span], *, rows: int = ROWS, skip: int = 4, seed: int = 0
    ) -> None:
        self.statistics = tuple(SpanStatistics(s, rows=rows, skip=skip, seed=seed) for s in spans)
        self.provenance: dict[str, Any] = {}
        self._bases: dict[int, SpanBasis] = {}

    def __repr__(self) -> str:
        widths = ", ".join(str(s.span.width) for s in self.statistics)
        return f"SpanCalibration({self.tokens:,} tokens, spans of {widths})"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of all spans."""
        return tuple(sorted(i for s in self.statistics for i in s.span.layers))

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
        return digest(
            {f"{i}.{n}": x for i, s in enumerate(self.statistics) for n, x in s.arrays.items()}
        )

    def update(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        gradients: tuple[Sequence[Array], Sequence[Array]] | None = None,
        /,
    ) -> None:
        """Add the tokens of whole sequences: see `SpanStatistics.update`.

        Parameters
        ----------
        keys, values : sequences of arrays
            One for every layer of the model.
        gradients : pair of sequences of arrays, optional

        Raises
        ------
        UnknownLayer
            If a layer of a span is missing; and the errors of `SpanStatistics.update`.
        """
        for statistics in self.statistics:
            layers = statistics.span.layers
            given = (keys, values, *(gradients or ()))
            if any(len(xs) <= layers[-1] for xs in given):
                counts = ", ".join(str(len(xs)) for xs in given)
                raise UnknownLayer(f"layer {layers[-1]} is missing, there are {counts}")
            k, v, *rest = ([xs[i] for i in layers] for xs in given)
            statistics.update(k, v, (rest[0], rest[1]) if rest else None)
        self._bases.clear()

    def train(self, bits: float, /) -> SpanTransform:
        """Train the codes of all spans to spend `bits` per value together: see `train_spans`.

        Parameters
        ----------
        bits : float

        Raises
        ------
        SettingError
            As `train_span`.
        """
        for i, s in enumerate(self.statistics):
            if i not in self._bases:
                self._bases[i] = span_basis(s)
        bases = [self._bases[i] for i in range(len(self.statistics))]
        return SpanTransform(train_spans(self.statistics, bits, bases))

    def save(self, path: str | PathLike[str], /) -> None:
        """Write a safetensors file."""
        arrays = {f"{i}.{n}": x for i, s in enumerate(self.statistics) for n, x in s.arrays.items()}
        facts = {"spans": [s.facts for s in self.statistics], "provenance": self.provenance}
        save_arrays(arrays, path, FORMAT, facts)

    @classmethod
    def load(cls, path: str | PathLike[str], /) -> SpanCalibration:
        """Read a file that `save` wrote.

        Raises
        ------
        CalibrationError
            If it is no such file.
        """
        arrays, facts = load_arrays(path, FORMAT)
        try:
            calibration = cls(())
            calibration.provenance = facts["provenance"]
            calibration.statistics = tuple(
                SpanStatistics.of(
                    known,
                    {
                        name.partition(".")[2]: x
                        for name, x in arrays.items()
                        if name.startswith(f"{i}.")
                    },
                )
                for i, known in enumerate(facts["spans"])
            )
        except (KVCompressError, KeyError, ValueError, TypeError) as error:
            raise CalibrationError(f"{path} holds no calibration of spans: {error}") from error
        return calibration
