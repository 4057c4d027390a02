"""Bases and codebooks of transform coding, trained on the statistics of a layer; on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np

from kvcompress.arrays import HostArray, bisect
from kvcompress.calibration.codebooks import train_codebooks
from kvcompress.calibration.distances import moment_before_rope
from kvcompress.calibration.format import check_parameters
from kvcompress.calibration.parameters import LayerParameters, RoleParameters
from kvcompress.calibration.statistics import LayerStatistics

Scope: TypeAlias = Literal["head", "layer"]
"""What is coded together: one head, or all heads of a layer."""

NORMS = 2
"""Bytes a token takes for norms per head: one of the key, one of the value."""

RIDGE = 1e-3
"""Weight of directions that no query reads, over the mean weight."""


_LEAST_NORM = 2.0**-60


@dataclass(frozen=True, eq=False)
class Bases:
    """Full bases of one role, float64 ``[units, ...]``, with the variance of every coefficient.

    `distortion` is that variance in units that compare between keys, values and layers: the mean
    square error of the attention logits, or of the values over their norms, if it is not coded.
    """

    mean: HostArray
    forward: HostArray
    backward: HostArray
    distortion: HostArray


@lru_cache(maxsize=256)
def key_bases(statistics: LayerStatistics, scope: Scope) -> Bases:
    """Coefficients whose squared error is the mean square error of the logits, times head_dim.

    Of keys before RoPE, the mean over the distances of `moment_before_rope`.
    """
    moment = statistics.query_moment
    if statistics.rope is not None:
        moment = moment_before_rope(moment, statistics.rope)
    head_dim = moment.shape[-1]
    weight = np.trace(moment, axis1=1, axis2=2)[:, None, None] / head_dim
    weight = np.where(weight > 0, weight, 1.0)
    root = np.linalg.cholesky(moment + RIDGE * weight * np.eye(head_dim))
    root = root if scope == "head" else _block_diagonal(root)[None]
    covariance = _covariance(statistics.key_covariance, len(moment), scope)
    rooted = np.swapaxes(root, 1, 2) @ covariance @ root
    variances, vectors = np.linalg.eigh(-rooted)
    forward = root @ vectors
    mean = statistics.key_mean.reshape(len(forward), -1)
    return Bases(mean, forward, np.linalg.inv(forward), _positive(-variances) / head_dim)


@lru_cache(maxsize=256)
def value_bases(statistics: LayerStatistics, scope: Scope) -> Bases:
    """Principal components of the values over their norms."""
    heads = len(statistics.value_mean)
    covariance = _covariance(statistics.value_covariance, heads, scope)
    variances, vectors = np.linalg.eigh(-covariance)
    mean = statistics.value_mean.reshape(len(vectors), -1)
    return Bases(mean, vectors, np.swapaxes(vectors, 1, 2), _positive(-variances))


def _block_diagonal(blocks: HostArray) -> HostArray:
    heads, dim, _ = blocks.shape
    matrix = np.zeros((heads, dim, heads, dim))
    matrix[np.arange(heads), :, np.arange(heads), :] = blocks
    return matrix.reshape(heads * dim, heads * dim)


def _covariance(joint: HostArray, heads: int, scope: Scope) -> HostArray:
    """Covariance ``[units, dim, dim]`` of what is coded together."""
    if scope == "layer":
        return joint[None]
    dim = len(joint) // heads
    blocks = joint.reshape(heads, dim, heads, dim)
    return np.stack([blocks[h, :, h] for h in range(heads)])


def rates(distortion: HostArray, level: float) -> HostArray:
    """Bits for every coefficient at a water level: ``log2(distortion / level) / 2``, 0 to 8."""
    return np.clip(np.log2(distortion / level) / 2, 0.0, 8.0)  # a byte is all that one can get


def water_level(distortions: list[HostArray], bits: float) -> float:
    """Water level at which the coefficients of all `distortions` deserve `bits` on average."""
    every = np.concatenate([np.ravel(distortion) for distortion in distortions])

    def below(log_level: float) -> bool:
        return float(np.mean(rates(every, 2.0**log_level))) > bits

    return float(2.0 ** bisect(below, -200.0, 200.0, steps=100))


def code_bytes(statistics: LayerStatistics, bits: float, scope: Scope) -> tuple[int, int]:
    """Bytes that the codes of a unit take on the keys and on the values of a token.

    Together with the bytes of the norms of keys and values they come to `bits` per value.
    """
    keys, values = (
        key_bases(statistics, scope).distortion,
        value_bases(statistics, scope).distortion,
    )
    key_dim, value_dim = keys.shape[-1], values.shape[-1]
    norms = NORMS * len(statistics.value_mean) // len(values)
    total = max(2, round(bits * (key_dim + value_dim) / 8) - norms)
    level = water_level([keys, values], 8 * total / (key_dim + value_dim))
    wanted = float(np.mean(np.sum(rates(keys, level), axis=-1))) / 8
    key_bytes = min(max(1, total - value_dim, round(wanted)), key_dim, total - 1)
    return key_bytes, min(total - key_bytes, value_dim)


@lru_cache(maxsize=256)
def train(statistics: LayerStatistics, bits: float, scope: Scope) -> LayerParameters:
    """Train the bases and codebooks of a layer, to spend `bits` per value over keys and values."""
    key_bytes, value_bytes = code_bytes(statistics, bits, scope)
    # Statistics may be of numbers that float32 cannot carry.
    with np.errstate(over="ignore", invalid="ignore"):
        parameters = LayerParameters(
            bits,
            train_role(key_bases(statistics, scope), statistics.key_rows, key_bytes),
            train_role(value_bases(statistics, scope), statistics.value_rows, value_bytes),
            statistics.value_log_norm.astype(np.float32),
            key_norms(statistics.key_rows),
            statistics.rope,
        )
    check_parameters(parameters.arrays)
    return parameters


def key_norms(rows: HostArray) -> HostArray:
    """Logarithms of the median, the least and the largest norm of keys: ``[heads, 3]``."""
    found = []
    for norms in np.linalg.norm(rows.astype(np.float32), axis=-1):
        some = norms[norms > 0]
        logs = np.log2(np.maximum(some if some.size else norms, _LEAST_NORM))
        found.append([np.median(logs), logs.min(), logs.max()])
    return np.asarray(found, dtype=np.float32)


def train_role(bases: Bases, rows: HostArray, count: int) -> RoleParameters:
    """Train what codes one role in `count` bytes per unit and token.

    Parameters
    ----------
    bases : Bases
    rows : array ``[heads, rows, head_dim]``
        Tokens drawn at random.
    count : int
    """
    units, dim, _ = bases.forward.shape
    heads = len(rows) // units
    rows = rows.reshape(units, heads, *rows.shape[1:]).swapaxes(1, 2).reshape(units, -1, dim)
    level = water_level([bases.distortion], 8 * count / bases.distortion.shape[-1])
    groups = even_groups(np.mean(rates(bases.distortion, level), axis=0), count)
    order = np.concatenate(groups)
    forward, backward = bases.forward[..., order], bases.backward[:, order, :]
    mean = bases.mean[:, None, :]
    offset = mean - mean @ forward @ backward
    forward, backward, offset = (x.astype(np.float32) for x in (forward, backward, offset))
    coefficients = rows.astype(np.float32) @ forward
    parts = np.split(coefficients, np.cumsum([len(group) for group in groups])[:-1], axis=-1)
    return RoleParameters(forward, tuple(map(train_codebooks, parts)), backward, offset)


def even_groups(bits: HostArray, count: int) -> list[HostArray]:
    """Deal coefficients out into groups that deserve about equal bits, each of at least one.

    A byte is worth most where it is spent on what deserves 8 bits together; runs of neighbours
    would be of one coefficient of 5, wasting 3, or of two, lacking 2.

    Parameters
    ----------
    bits : array ``[coefficients]``
        Bits each deserves, falling; those at the end that deserve none are left out.
    count : int
        1 to the number of coefficients.

    Returns
    -------
    list of `count` arrays of int
        Numbers of the coefficients in every group, rising.
    """
    used = max(count, int(np.sum(bits > 0.02)))
    groups: list[list[int]] = [[i] for i in range(count)]
    spent = np.array(bits[:count], dtype=np.float64)
    for i in range(count, used):
        poorest = int(np.argmin(spent))
        groups[poorest].append(i)
        spent[poorest] += bits[i]
    return [np.array(group) for group in groups]


def _positive(variances: HostArray) -> HostArray:
    """Variances without the zeros, or less, that rounding leaves."""
    floor = 1e-9 * np.max(variances, axis=-1, keepdims=True, initial=0) + 1e-30
    positive: HostArray = np.maximum(variances, floor)
    return positive
