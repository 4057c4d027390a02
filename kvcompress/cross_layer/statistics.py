"""The joint covariance of the layers of a group, and what else their parameters are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvcompress.arrays import FLOAT16_MAX, Array, HostArray, digest, to_host
from kvcompress.cross_layer.format import TOKENS, check_statistics, read_group
from kvcompress.cross_layer.layer_group import LayerGroup
from kvcompress.cross_layer.metric import Metric, matrix_numbers, metric_of
from kvcompress.errors import (
    CalibrationError,
    NonFiniteError,
    ShapeError,
    check_integer,
)
from kvcompress.files import Facts

_LEAST = 256
"""Least number of tokens to train on."""

ROWS = 512
"""Default for the tokens kept to train tables on: a million coefficients."""

_LARGEST = 2.0**48
"""Largest number of a row: sums of squares of such are float32."""

_ENOUGH = 4
"""The sample is held out of the covariance if there are so many times as many tokens."""

_FAINT, _FAINTEST = 2.0**-6, 2.0**-20
"""Least energy of the gradients of a token, over the mean: in directions, and in logarithms."""


class LayerGroupStatistics:
    """Covariance of the rows of a layer group within their sequences, and what errors of them do.

    What it holds does not grow with the texts: ``4 * width**2`` bytes, and those of the rows.

    Parameters
    ----------
    group : LayerGroup
    rows : int
        Tokens kept, as float16, to train the entropy coder on.
    skip : int
        First tokens of every sequence left out: see `Calibration`.
    seed : int
        Of the choice of rows.
    """

    def __init__(
        self, group: LayerGroup, *, rows: int = ROWS, skip: int = 4, seed: int = 0
    ) -> None:
        check_integer("rows", rows, 256)
        check_integer("skip", skip, 0)
        check_integer("seed", seed, 0)
        self.group, self.rows, self.skip, self.seed = group, rows, skip, seed
        width = group.width
        self.tokens = self.weighed = 0
        self._sum = np.zeros(width, np.float64)
        self._moment = np.zeros((width, width), np.float32)
        self._tags = np.zeros(0)
        self._rows = np.zeros((0, width), np.float16)
        self._gradients = np.zeros(matrix_numbers(group))
        self._importance = np.zeros(width)

    def update(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        gradients: tuple[Sequence[Array], Sequence[Array]] | None = None,
        /,
        *,
        positions: Array | None = None,
    ) -> None:
        """Add the tokens of whole sequences, or change nothing.

        Parameters
        ----------
        keys, values : sequences of arrays ``[batch, num_heads, tokens, head_dim]``
            One for every layer of the layer group, as the cache holds them: keys after RoPE.
        gradients : pair of sequences of arrays like `keys` and `values`, optional
            Of the log-likelihood, to the model itself, of tokens drawn by it that read this cache:
            their squares are the Fisher information, which says how far the model's predictions
            move with an error (Martens 2014, arXiv 1412.1193). Tokens whose gradients are all zero
            are left out. Without gradients, all numbers count alike.
        positions : integer array ``[tokens]``, optional
            0, 1, 2, ... if left out.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError, NonFiniteError
        """
        ks, vs, dks, dvs = (
            [to_host(x) for x in xs] for xs in (keys, values, *(gradients or ((), ())))
        )
        self._check(ks, vs, dks, dvs)
        place = np.arange(ks[0].shape[2]) if positions is None else to_host(positions)
        batch, cut = ks[0].shape[0], slice(self.skip, None)
        rows = self.group.join([k[:, :, cut] for k in ks], [v[:, :, cut] for v in vs], place[cut])
        weights = np.zeros((0, self.group.width), np.float32)
        if dks:
            v, dk, dv = ([x[:, :, cut] for x in xs] for xs in (vs, dks, dvs))
            with np.errstate(over="ignore", invalid="ignore"):
                weights = self.group.join_gradients(v, dk, dv, place[cut])
        for name, x in (("keys and values", rows), ("gradients", weights)):
            if not np.max(np.abs(x), initial=0) <= _LARGEST:
                raise NonFiniteError(
                    f"{name} hold numbers that are not finite or exceed {_LARGEST:g}"
                )
        for b, sequence in enumerate(np.split(rows, batch) if rows.size else ()):
            mean = sequence.mean(0, dtype=np.float64)
            self._sum += mean * len(sequence)
            sequence = sequence - mean.astype(np.float32)
            self._add(sequence)
            if weights.size:
                self._weigh(sequence, np.split(weights, batch)[b])

    @property
    def mean(self) -> HostArray:
        """Mean row, float64."""
        self._require()
        mean: HostArray = self._sum / self.tokens
        return mean

    def covariance(self) -> HostArray:
        """Covariance of the rows within their sequences, float32, without the `sample`; a copy.

        What is trained on the sample would otherwise take the basis for better than it is.
        """
        self._require()
        held = self._rows if self.tokens >= _ENOUGH * len(self._rows) else self._rows[:0]
        away = held.astype(np.float32)
        covariance: HostArray = self._moment - away.T @ away
        covariance /= np.float32(self.tokens - len(held))
        return covariance

    @property
    def sample(self) -> HostArray:
        """Rows drawn at random, less the means of their sequences, float16."""
        self._require()
        return self._rows

    @property
    def metric(self) -> Metric:
        """What errors of the numbers of a row do."""
        return metric_of(self.group, self._gradients if self.weighed else None)

    @property
    def importance(self) -> HostArray:
        """Covariance of the numbers of a row with the importance of the token, float64 ``[width]``.

        Importance: the binary logarithm of the energy of its gradients, over the mean of its
        sequence. It is what a step for every token should follow.
        """
        importance: HostArray = self._importance / max(self.weighed, 1)
        return importance

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all statistics, in hexadecimal."""
        return digest(self.arrays)

    @property
    def arrays(self) -> Mapping[str, HostArray]:
        """Every array held, by name."""
        return {
            "sum": self._sum,
            "moment": self._moment,
            "tags": self._tags,
            "rows": self._rows,
            "gradients": self._gradients,
            "importance": self._importance,
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that is not an array, as JSON can carry it."""
        return {
            "group": self.group.to_dict(),
            "settings": {"rows": self.rows, "skip": self.skip, "seed": self.seed},
            "tokens": self.tokens,
            "weighed": self.weighed,
        }

    @classmethod
    def of(cls, facts: Facts, arrays: Mapping[str, HostArray]) -> LayerGroupStatistics:
        """Undo `arrays` and `facts`.

        Raises
        ------
        CalibrationError, SettingError
            If they are not such arrays and facts, or do not fit each other.
        """
        group = read_group(facts.object("group", "layers", "shapes"))
        settings = facts.object("settings", "rows", "skip", "seed").plain
        tokens, weighed = (facts.integer(name, 0, TOKENS) for name in ("tokens", "weighed"))
        rows = check_integer("rows", settings["rows"], 256)
        check_statistics(group, arrays, tokens, weighed, rows)
        # Only now: it allocates as much as there is in the arrays.
        statistics = cls(group, **settings)
        statistics.tokens, statistics.weighed = tokens, weighed
        for name in statistics.arrays:
            setattr(statistics, f"_{name}", arrays[name])
        return statistics

    def _add(self, rows: HostArray) -> None:
        """Add rows of a sequence, less their mean."""
        tags = np.random.default_rng((self.seed, self.tokens)).random(len(rows))
        self.tokens += len(rows)
        self._moment += rows.T @ rows
        tags = np.concatenate([self._tags, tags])
        kept = np.concatenate(
            [self._rows, np.clip(rows, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)]
        )
        keep = np.sort(np.argsort(tags)[: self.rows])
        self._tags, self._rows = tags[keep], kept[keep]

    def _weigh(self, rows: HostArray, gradients: HostArray) -> None:
        """Add gradients by the rows of a sequence."""
        told = np.any(gradients, axis=1)
        if not np.any(told):
            return
        rows, heads = rows[told], self.group.heads(gradients[told])
        power = np.concatenate([np.sum(x * x, axis=2) for x in heads], axis=1)
        usual = power.mean(0)
        if not np.any(usual):  # squares are smaller than float32 can tell from zero
            return
        energy = np.mean(power[:, usual > 0] / usual[usual > 0], axis=1)
        logs = np.log2(np.maximum(energy, _FAINTEST))
        self.weighed += len(rows)
        self._importance += (logs - logs.mean()) @ (rows - rows.mean(0))
        # Few tokens have most of the energy; directions are learned from all.
        evenly = 1 / np.sqrt(np.maximum(energy, _FAINT))[:, None, None]
        moved = [np.moveaxis(x * evenly.astype(np.float32), 0, 2) for x in heads]
        moments = [x @ np.swapaxes(x, 1, 2) for x in moved]
        self._gradients += np.concatenate([x.ravel() for x in moments])

    def _require(self) -> None:
        if self.tokens < _LEAST:
            raise CalibrationError(
                f"the layer group saw {self.tokens} tokens; {_LEAST} are the least"
            )

    def _check(
        self, ks: Sequence[HostArray], vs: Sequence[HostArray], *gradients: Sequence[HostArray]
    ) -> None:
        self.group.check(ks, vs)
        for xs, ds in zip((ks, vs), gradients, strict=True):
            shapes, expected = [d.shape for d in ds], [x.shape for x in xs]
            if ds and shapes != expected:
                raise ShapeError(
                    f"gradients must have the shapes of keys and values, {expected}, got {shapes}"
                )
