"""Means of sequences, kept with finer steps than the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, device, to_host
from kvcompress.cross_layer.parameters import CrossLayerParameters
from kvcompress.cross_layer.tables import Forward, weighed
from kvcompress.entropy.context_model import CLASSES, classes_of
from kvcompress.entropy.rans import Decoder, Encoder
from kvcompress.entropy.streams import LANES, NOTHING, from_lanes, pack, to_lanes, unpack
from kvcompress.errors import CodingError

MEAN_FROM = 128
"""Tokens of a sequence from which their mean is kept beside them."""

_FAR = 16.0
"""Power, over the median, from which rows are left out of the mean."""

_LARGEST_MEAN, _LARGEST_SHIFT = 2.0**14, 16
"""Of means in steps, and of the binary logarithms of what they are multiplied by."""


def mean_of(tables: Forward, blocks: Iterator[Array]) -> HostArray:
    """Mean of rows, weighed, without those far larger than usual, such as attention sinks."""
    total, count, most = np.zeros(1), 0, -1.0
    for rows in blocks:
        block, kept, most = _sum(weighed(tables, rows), most)
        total, count = total + block, count + kept
    mean: HostArray = (total / max(count, 1)).astype(np.float32)
    return mean


def _sum(z: Array, most: float) -> tuple[HostArray, int, float]:
    """Sum and number of the rows of at most a power, and that power: chosen here if negative."""
    xp = array_namespace(z)
    power = to_host(xp.vecdot(z, z))
    if most < 0:
        most = _FAR * float(np.median(power))
    keep = (power <= most) & np.isfinite(power)
    if not keep.all():
        z = xp.where(xp.asarray(keep[:, None], device=device(z)), z, 0.0)
    return to_host(xp.sum(z, axis=0)), int(keep.sum()), most


def encode_means(
    parameters: CrossLayerParameters, means: HostArray, tokens: int
) -> tuple[dict[str, HostArray], HostArray]:
    """Arrays of a payload for means of sequences, in steps, and what they will be restored to.

    Attention averages over tokens: what all have in common is to be known better, by the root of
    their number, than any of them.
    """
    count = len(means)
    if not count:
        return {"means": np.zeros((0, 2), np.uint8), **pack(*NOTHING, "mean_")}, means
    shift = round(math.log2(tokens) / 2)
    q = np.rint(np.clip(means, -_LARGEST_MEAN, _LARGEST_MEAN) * np.float32(2.0**shift))
    usual = classes_of(np.sqrt(np.mean(np.square(q, dtype=np.float64), keepdims=True).ravel()))
    lanes = to_lanes(q)
    coder = Encoder(lanes.shape[1])
    parameters.model.push(coder, lanes, np.repeat(usual, len(lanes)))
    header = np.asarray([[shift, usual[0]]], np.uint8)
    return {"means": header, **pack(*coder.finish(), "mean_")}, q * np.float32(2.0**-shift)


def decode_means(parameters: CrossLayerParameters, host: Mapping[str, HostArray]) -> HostArray:
    """Undo `encode_means`."""
    width = parameters.group.width
    words, lengths = unpack(host, "mean_")
    if len(host["means"]) != bool(lengths.size) or lengths.size % LANES:
        raise CodingError(f"{lengths.size} lanes cannot be those of means; the payload is damaged")
    if not lengths.size:
        return np.zeros((0, width), np.float32)
    shift, usual = host["means"][0].tolist()
    if shift > _LARGEST_SHIFT or usual >= CLASSES:
        raise CodingError(f"means have shift {shift} and class {usual}; the payload is damaged")
    coder = Decoder(words, lengths)
    steps = -(-width // LANES)
    q = parameters.model.pull(coder, np.full(steps, usual, np.uint8), lengths.size)
    coder.finish()
    means: HostArray = from_lanes(q, width).astype(np.float32) * np.float32(2.0**-shift)
    return means
