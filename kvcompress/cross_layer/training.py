"""Bases and entropy tables of layer groups, trained on their statistics; on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcompress.arrays import HostArray, bisect
from kvcompress.cross_layer.format import check_parameters
from kvcompress.cross_layer.layer_group import LayerGroup
from kvcompress.cross_layer.metric import Metric
from kvcompress.cross_layer.parameters import CrossLayerParameters, store_basis
from kvcompress.cross_layer.statistics import LayerGroupStatistics
from kvcompress.entropy.context_model import (
    CLASSES,
    OCTAVE,
    ContextModel,
    classes_of,
    fit,
    level_frequencies,
    token_levels,
)
from kvcompress.errors import CalibrationError, SettingError

LAGRANGE = 0.06
"""Squared error, in steps, that a bit is worth: of the entropy-coded uniform quantizer at high rate
it is ``ln(2) / 6``; half of it, because thresholds lie in the middle."""

SHARE = 0.5
"""Default for the components of a basis, over the width of the layer group."""

NARROW = 4096
"""Width of layer groups up to which all components are kept by default."""

LEAST = 0.2
"""Root mean square, in steps, of the components that are kept."""

LIMIT = 12.0
"""Squared error of a token, over the mean, from which its residual is coded too."""

TOLERANCE = 0.01
"""How far the bits may be from those asked for, as a binary logarithm."""

IMPORTANT = 256
"""Components from which the importance of a token is predicted."""

_OCTAVES = 60.0
"""Steps are from two to minus this, to two to this."""

_RIDGE = 300
"""Ridge of the regression of the importance, in tokens."""


@dataclass(frozen=True, eq=False)
class LayerGroupBasis:
    """Leading principal components of a layer group, in units of distortion; float32 on the host.

    Attributes
    ----------
    mean : array ``[width]``
        Of the rows.
    metric : Metric
        What rows, less their mean, are weighed by.
    vectors : array ``[width, components]``
        Orthonormal columns.
    variances : array ``[components]``
        Falling.
    importance : array ``[first components]``
        By coefficient: its contribution to the binary logarithm of the importance of a token.
    """

    mean: HostArray
    metric: Metric
    vectors: HostArray
    variances: HostArray
    importance: HostArray


def fit_basis(
    statistics: LayerGroupStatistics, /, *, components: int | None = None
) -> LayerGroupBasis:
    """Leading components of the covariance of a layer group, by subspace iteration.

    Halko, Martinsson, Tropp 2011, arXiv 0909.4061: a few products with a random matrix find the
    subspace, in a third of the time and memory of all eigenvectors; that neighbours at its end stay
    mixed costs nothing.

    Parameters
    ----------
    statistics : LayerGroupStatistics
    components : int, optional
        At most the width of the layer group. If left out, all of a narrow group, and half of a
        wide one.
    """
    width, metric = statistics.group.width, statistics.metric
    if components is None:
        components = width if width <= NARROW else math.ceil(SHARE * width)
    if not 1 <= components <= width:
        raise SettingError(f"components must be from 1 to {width}, got {components}")
    covariance = metric.sandwich(statistics.covariance())
    if not np.all(np.isfinite(covariance)):
        raise CalibrationError(
            "statistics cannot be trained on: the covariance, in units of distortion, exceeds "
            "float32"
        )
    if components > width // 2:
        variances, vectors = np.linalg.eigh(-covariance)
        variances, vectors = -variances[:components], vectors[:, :components]
    else:
        more = min(width, components + 32)
        vectors = np.random.default_rng(0).standard_normal((width, more), dtype=np.float32)
        for _ in range(2):
            vectors = _conditioned(covariance @ vectors)
        vectors = np.linalg.qr(vectors).Q
        inner = vectors.T @ (covariance @ vectors)
        variances, turn = np.linalg.eigh(-inner)
        variances = -variances[:components]
        vectors = vectors @ turn[:, :components]
    variances = np.maximum(variances, 0)
    return LayerGroupBasis(
        statistics.mean.astype(np.float32),
        metric,
        vectors,
        variances,
        _importance(statistics, metric, vectors[:, :IMPORTANT], variances[:IMPORTANT]),
    )


def _importance(
    statistics: LayerGroupStatistics, metric: Metric, vectors: HostArray, variances: HostArray
) -> HostArray:
    """Regression of the logarithm of the importance on coefficients, which are uncorrelated."""
    together = metric.apply(statistics.importance.astype(np.float32)[None])[0] @ vectors
    ridge = 1 + _RIDGE / max(statistics.weighed, 1)
    found: HostArray = together / np.maximum(variances * ridge, 1e-9 * variances[0] + 1e-30)
    return found


def _conditioned(x: HostArray) -> HostArray:
    """Return well-conditioned columns of about the same span, faster than orthonormal ones.

    One step of shifted Cholesky: Fukaya et al. 2020, arXiv 1809.11085.
    """
    x = x / np.maximum(np.linalg.norm(x, axis=0), 1e-30)
    gram = x.T @ x
    gram[np.diag_indices(len(gram))] += 1e-5 * np.linalg.norm(gram)
    inverse = np.linalg.inv(np.linalg.cholesky(gram.astype(np.float64)))
    return x @ inverse.T.astype(np.float32)


def train_layer_group(
    statistics: LayerGroupStatistics, bits: float, /, *, basis: LayerGroupBasis | None = None
) -> CrossLayerParameters:
    """Train a layer group to spend `bits` per value on tokens like those of its statistics.

    Parameters
    ----------
    statistics : LayerGroupStatistics
    bits : float
        Bits per value on the calibration's own rows; texts unlike them take more.
    basis : LayerGroupBasis, optional
        Of the same statistics, where several rates are trained: most of the time goes there.

    Raises
    ------
    SettingError
        If the rate is not positive, or not one that the components of the basis can spend.
    """
    if basis is None:
        basis = fit_basis(statistics)
    (parameters,) = train_layer_groups([statistics], bits, [basis])
    return parameters


def train_layer_groups(
    statistics: Sequence[LayerGroupStatistics], bits: float, bases: Sequence[LayerGroupBasis], /
) -> tuple[CrossLayerParameters, ...]:
    """Train the parameters of layer groups to spend `bits` per value together.

    All have one step: a bit then saves as much distortion in one group as in another.

    Parameters
    ----------
    statistics : sequence of LayerGroupStatistics
    bits : float
        As for `train_layer_group`, the mean over all values of a token.
    bases : sequence of LayerGroupBasis

    Raises
    ------
    SettingError
        As `train_layer_group`.
    """
    if not statistics:
        raise CalibrationError("there are no layer groups to train")
    if not 0 < bits < 16:
        raise SettingError(f"bits must be above 0 and below 16, got {bits!r}")
    samples = [_sample(*pair) for pair in zip(statistics, bases, strict=True)]
    target = bits * sum(s.group.num_values for s in statistics)
    variances = np.concatenate([s.variances * s.basis.metric.weight for s in samples])
    logarithm = _first_guess(variances, target)
    slope = -0.6  # of the logarithm of the bits to that of the step, to begin with
    known: tuple[float, float] | None = None
    for _ in range(20):
        trials = [_trial(s, 2.0**logarithm / math.sqrt(s.basis.metric.weight)) for s in samples]
        spent = sum(t.bits / len(s.rows) for t, s in zip(trials, samples, strict=True))
        over = math.log2(max(spent, 1e-3) / target)
        if abs(over) < TOLERANCE:
            groups = zip(statistics, samples, trials, strict=True)
            return tuple(_code(s.group, bits, sample, trial) for s, sample, trial in groups)
        if known is not None and abs(logarithm - known[0]) > 1e-6:
            slope = min(max((over - known[1]) / (logarithm - known[0]), -4.0), -0.2)
        known = logarithm, over
        logarithm = min(max(logarithm - over / slope, -_OCTAVES), _OCTAVES)
    raise SettingError(
        f"{len(variances)} components cannot spend {bits:g} bits per value, but "
        f"{spent / target * bits:.3g}"
    )


@dataclass(frozen=True, eq=False)
class _Sample:
    """Weighed rows of the sample and their coefficients, scaled by the levels of the tokens."""

    basis: LayerGroupBasis
    rows: HostArray
    coefficients: HostArray
    variances: HostArray
    levels: HostArray


def _sample(statistics: LayerGroupStatistics, basis: LayerGroupBasis) -> _Sample:
    rows = basis.metric.apply(statistics.sample.astype(np.float32))
    coefficients = rows @ basis.vectors
    levels = token_levels(coefficients[:, : len(basis.importance)] @ basis.importance)
    factor = np.exp2(levels[:, None] / np.float32(OCTAVE))
    variances = basis.variances * np.mean(factor * factor)
    return _Sample(basis, rows * factor, coefficients * factor, variances, levels)


def _first_guess(variances: HostArray, bits: float) -> float:
    """Binary logarithm of the step at which components of these variances deserve so many bits."""
    logs = np.log2(np.maximum(variances.astype(np.float64), 1e-30)) / 2

    def below(log_step: float) -> bool:
        return float(np.sum(np.maximum(0.0, logs - log_step + 0.5))) > bits

    return float(bisect(below, -_OCTAVES, _OCTAVES, steps=60))


@dataclass(frozen=True, eq=False)
class _Trial:
    """Coefficients of the sample, in steps, their codes, and what those cost."""

    step: float
    sizes: HostArray
    classes: HostArray
    rounding: HostArray
    model: ContextModel
    y: HostArray
    q: HostArray
    bits: float


def _trial(sample: _Sample, step: float) -> _Trial:
    step = min(max(step, 2.0**-_OCTAVES), 2.0**_OCTAVES)
    y = np.clip(sample.coefficients.T / np.float32(step), -(2.0**30), 2.0**30)
    size = np.sqrt(sample.variances) / step
    used = int(np.max(np.flatnonzero(size > LEAST), initial=0)) + 1
    y, size, classes = y[:used], size[:used], classes_of(size[:used])
    rounding = np.full(CLASSES, 0.6, np.float32)
    for _ in range(2):
        q = quantize(y, rounding[classes])
        model = fit(q, classes, sample.levels)
        rounding = _rounding(model)
    q = quantize(y, rounding[classes])
    bits = model.bits(q, classes, sample.levels)
    return _Trial(step, size, classes, rounding, model, y, q, bits)


def quantize(y: HostArray, rounding: HostArray) -> HostArray:
    """Whole numbers, int32, for coefficients ``[components, tokens]`` in steps."""
    magnitude: HostArray = np.floor(np.abs(y) + (1 - rounding[:, None]))
    return np.copysign(magnitude, y).astype(np.int32)


def _rounding(model: ContextModel) -> HostArray:
    """Fractions from which rounding up is worth its bits: of one, which is most of them."""
    frequencies = model.frequencies.astype(np.float64)
    middle = (frequencies.shape[1] - 1) // 2
    dearer = np.log2(frequencies[:, middle] / frequencies[:, middle + 1])
    return np.clip(0.5 + LAGRANGE * dearer, 0.5, 0.95).astype(np.float32)


def _code(group: LayerGroup, bits: float, sample: _Sample, trial: _Trial) -> CrossLayerParameters:
    basis, rows = sample.basis, sample.rows
    used, (classes, q, y) = len(trial.classes), (trial.classes, trial.q, trial.y)
    vectors = basis.vectors[:, :used].T
    centres = _centres(q, y, classes)
    restored = restore_magnitudes(q, classes, centres)
    residual = rows / np.float32(trial.step) - restored.T @ vectors
    sizes = np.sqrt(np.mean(np.square(residual), axis=0, dtype=np.float64))
    error = float(np.mean(np.sum(np.square(residual), axis=1, dtype=np.float64)))
    importance = basis.importance[:used] * np.float32(trial.step)
    parameters = CrossLayerParameters(
        group=group,
        bits=bits,
        mean=basis.mean,
        metric_roots=basis.metric.roots.astype(np.float16),
        step=np.asarray([trial.step], np.float32),
        **store_basis(vectors, trial.sizes),
        importance=importance.astype(np.float32),
        level_frequencies=level_frequencies(sample.levels),
        classes=classes,
        residual_classes=classes_of(sizes),
        limit=np.asarray([LIMIT * error], np.float32),
        rounding=trial.rounding,
        centres=centres,
        frequencies=trial.model.frequencies,
        magnitudes=trial.model.magnitudes,
        thresholds=trial.model.thresholds,
    )
    # Statistics may be of numbers that float32 and float16 cannot carry.
    check_parameters(group, parameters.arrays)
    return parameters


def restore_magnitudes(q: HostArray, classes: HostArray, centres: HostArray) -> HostArray:
    """Coefficients, float32, in steps, that whole numbers ``[components, tokens]`` stand for."""
    one, more = (centre[classes][:, None] for centre in centres)
    magnitude = np.abs(q).astype(np.float32)
    magnitude -= np.where(magnitude == 1, one, np.where(magnitude > 1, more, np.float32(0)))
    return np.copysign(magnitude, q)


def _centres(q: HostArray, y: HostArray, classes: HostArray) -> HostArray:
    """How much nearer to zero than ``|q|`` the coefficients are, by class."""
    centres = np.zeros((2, CLASSES))
    magnitude = np.abs(q)
    for row, these in enumerate((magnitude == 1, magnitude > 1)):
        near, count = np.zeros(CLASSES), np.full(CLASSES, 50.0)
        np.add.at(near, classes, np.sum((magnitude - np.abs(y)) * these, axis=1))
        np.add.at(count, classes, np.sum(these, axis=1))
        centres[row] = near / count
    return np.clip(centres, -0.5, 0.5).astype(np.float32)
