"""The joint covariance of layers taken together, and more that a span code is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvcompress._namespace import Array, to_host
from kvcompress.errors import (
    CalibrationError,
    NonFiniteError,
    ShapeError,
    check_integer,
)
from kvcompress.layer_statistics import HostArray, digest
from kvcompress.rope import RoPE
from kvcompress.spans.files import span_from_dict, span_to_dict
from kvcompress.spans.span import Span

_LEAST = 256
"""Tokens without which there is nothing to train on."""

ROWS = 512
"""Tokens kept to train tables on, where nothing else is said: a million coefficients."""

_ENOUGH = 4
"""Tokens over those of the sample from which the sample is held out."""

_BLOCK = 1024
"""Tokens whose rows are held in float32 at a time."""


class SpanStatistics:
    """Mean and covariance of the rows of a span, rows drawn at random, and the weight of every key.

    What it holds does not grow with the texts: ``4 * width**2`` bytes, and those of the rows.

    Parameters
    ----------
    span : Span
    rows : int
        Tokens kept, as float16, to train the entropy coder on.
    skip : int
        First tokens of every sequence left out: see `Calibration`.
    seed : int
        Of the choice of rows.
    """

    def __init__(self, span: Span, *, rows: int = ROWS, skip: int = 4, seed: int = 0) -> None:
        check_integer("rows", rows, 256)
        check_integer("skip", skip, 0)
        check_integer("seed", seed, 0)
        self.span, self.rows, self.skip, self.seed = span, rows, skip, seed
        width = span.width
        self.tokens = 0
        self._shift = np.zeros(width, np.float32)  # about the mean: float32 sums stay exact enough
        self._sum = np.zeros(width, np.float64)
        self._moment = np.zeros((width, width), np.float32)
        self._queries = 0
        self._query_moment = [np.zeros((s.heads, s.key_dim)) for s in span.shapes]
        self._tags = np.zeros(0)
        self._rows = np.zeros((0, width), np.float16)

    def update(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        queries: Sequence[Array] | None = None,
        /,
        *,
        positions: Array | None = None,
    ) -> None:
        """Add the tokens of whole sequences, or change nothing.

        Parameters
        ----------
        keys, values : sequences of arrays ``[batch, num_heads, tokens, head_dim]``
            One for every layer of the span, as the cache holds them: keys after RoPE.
        queries : sequence of arrays ``[batch, num_query_heads, tokens, head_dim]``, optional
            As attention uses them: after RoPE. Without, all channels of keys count alike.
        positions : integer array ``[tokens]``, optional
            0, 1, 2, ... if left out.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError, NonFiniteError
        """
        ks, vs, qs = ([to_host(x) for x in xs] for xs in (keys, values, queries or ()))
        self._check(ks, vs, qs)
        place = np.arange(ks[0].shape[2]) if positions is None else to_host(positions)
        cuts = [slice(i, i + _BLOCK) for i in range(self.skip, len(place), _BLOCK)]
        blocks = [
            self.span.join([k[:, :, cut] for k in ks], [v[:, :, cut] for v in vs], place[cut])
            for cut in cuts
        ]
        if not all(np.all(np.isfinite(block)) for block in blocks):
            raise NonFiniteError("keys or values hold numbers that are not finite")
        for block in blocks:
            self._add(block)
        if qs:
            self._queries += qs[0].shape[0] * qs[0].shape[2]
            for total, q, shape in zip(self._query_moment, qs, self.span.shapes, strict=True):
                power = np.sum(np.square(q, dtype=np.float64), axis=(0, 2))
                power = power.reshape(shape.heads, -1, shape.key_dim).mean(1)
                total += power if shape.rope is None else _of_pairs(power, shape.rope)

    @property
    def mean(self) -> HostArray:
        """Mean row, float64, without the `sample`."""
        away, count = self._held_out()
        mean: HostArray = self._shift + (self._sum - away.sum(0, dtype=np.float64)) / count
        return mean

    def covariance(self) -> HostArray:
        """Covariance of the rows, float32, without the `sample`; a copy.

        What is trained on the sample would otherwise take the basis for better than it is.
        """
        away, count = self._held_out()
        mean = ((self._sum - away.sum(0, dtype=np.float64)) / count).astype(np.float32)
        covariance: HostArray = self._moment - away.T @ away
        covariance /= np.float32(count)
        for i in range(0, mean.size, _BLOCK):
            covariance[i : i + _BLOCK] -= mean[i : i + _BLOCK, None] * mean
        return covariance

    def _held_out(self) -> tuple[HostArray, int]:
        """The sample, less the shift, and the number of other tokens; none if those are few."""
        self._require()
        held = self._rows if self.tokens >= _ENOUGH * len(self._rows) else self._rows[:0]
        return held.astype(np.float32) - self._shift, self.tokens - len(held)

    @property
    def sample(self) -> HostArray:
        """Rows drawn at random, float16."""
        self._require()
        return self._rows

    @property
    def weights(self) -> HostArray:
        """What a squared error of each number of a row does, float64 ``[width]``.

        Of keys, to the mean square of the attention logits; of the others, to that of the values
        over their norms. See `kvcompress.training.Bases`.
        """
        parts = []
        for moment, shape in zip(self._query_moment, self.span.shapes, strict=True):
            if self._queries:
                keys = moment.ravel() / self._queries / shape.key_dim
                # What no query reads may be read by one to come.
                keys = np.maximum(keys, 1e-3 * max(keys.mean(), 1e-30))
            else:
                keys = np.full(moment.size, 1 / shape.key_dim)
            logs = np.full(shape.heads, np.log(2) ** 2)  # the relative error of a norm
            parts += [keys, np.ones(shape.heads * shape.value_dim), logs]
        return np.concatenate(parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all statistics, in hexadecimal."""
        return digest(self.arrays)

    @property
    def arrays(self) -> Mapping[str, HostArray]:
        """Every array held, by name."""
        queries = {f"query_moment.{i}": x for i, x in enumerate(self._query_moment)}
        return {
            "shift": self._shift,
            "sum": self._sum,
            "moment": self._moment,
            "tags": self._tags,
            "rows": self._rows,
            **queries,
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that is no array, as JSON can carry it."""
        return {
            "span": span_to_dict(self.span),
            "settings": {"rows": self.rows, "skip": self.skip, "seed": self.seed},
            "tokens": self.tokens,
            "queries": self._queries,
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any], arrays: Mapping[str, HostArray]) -> SpanStatistics:
        """Undo `arrays` and `facts`.

        Raises
        ------
        CalibrationError
            If they do not fit each other; or what Python raises at what is missing.
        """
        statistics = cls(span_from_dict(facts["span"]), **facts["settings"])
        for name, known in statistics.arrays.items():
            shape = arrays[name].shape
            if name not in ("tags", "rows") and shape != known.shape:
                raise CalibrationError(f"{name} has shape {shape}, expected {known.shape}")
        statistics.tokens, statistics._queries = facts["tokens"], facts["queries"]
        statistics._shift, statistics._sum, statistics._moment = (
            arrays[name] for name in ("shift", "sum", "moment")
        )
        statistics._tags, statistics._rows = arrays["tags"], arrays["rows"]
        count = len(statistics._query_moment)
        statistics._query_moment = [arrays[f"query_moment.{i}"] for i in range(count)]
        return statistics

    def _add(self, block: HostArray) -> None:
        if not self.tokens:
            self._shift = block.mean(0)
        tags = np.random.default_rng((self.seed, self.tokens)).random(len(block))
        self.tokens += len(block)
        away = block - self._shift
        self._sum += away.sum(0, dtype=np.float64)
        self._moment += away.T @ away
        tags = np.concatenate([self._tags, tags])
        rows = np.concatenate([self._rows, np.clip(block, -65504, 65504).astype(np.float16)])
        keep = np.sort(np.argsort(tags)[: self.rows])
        self._tags, self._rows = tags[keep], rows[keep]

    def _require(self) -> None:
        if self.tokens < _LEAST:
            raise CalibrationError(f"the span saw {self.tokens} tokens; {_LEAST} are the least")

    def _check(
        self, ks: Sequence[HostArray], vs: Sequence[HostArray], qs: Sequence[HostArray]
    ) -> None:
        count = len(self.span.layers)
        if len(ks) != count or len(vs) != count or len(qs) not in (0, count):
            raise ShapeError(
                f"expected keys, values and queries of {count} layers, "
                f"got {len(ks)}, {len(vs)} and {len(qs)}"
            )
        self.span.check(ks, vs)
        for q, k in zip(qs, ks, strict=False):
            if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
                raise ShapeError(
                    "queries must have the batch and head_dim of the keys and a multiple of their "
                    f"heads, got {q.shape} for {k.shape}"
                )


def _of_pairs(power: HostArray, rope: RoPE) -> HostArray:
    """Give both channels that RoPE rotates into each other their mean power."""
    turned, rest = power[:, : rope.dim], power[:, rope.dim :]
    shape = (-1, rope.dim // 2, 2) if rope.interleaved else (-1, 2, rope.dim // 2)
    axis = 2 if rope.interleaved else 1
    pairs = turned.reshape(len(power), *shape[1:])
    mean = np.broadcast_to(pairs.mean(axis, keepdims=True), pairs.shape)
    return np.concatenate([mean.reshape(turned.shape), rest], axis=1)
