"""Which settings of a method make how many bits per value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvcompress.calibration.calibration import Calibration
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.cross_layer.calibration import CrossLayerCalibration
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.methods import GroupQuantization, Method, RotatedQuantization, TransformCoding
from kvcompress.ops.packing import CODE_BITS
from kvcompress.plan import plan

_RATES: Mapping[str, tuple[Callable[[Any], Method], tuple[int, ...]]] = {
    GroupQuantization.__name__: (GroupQuantization, CODE_BITS),
    RotatedQuantization.__name__: (RotatedQuantization, tuple(range(1, 9))),
}

TRANSFORM = TransformCoding.__name__
"""The method that can use a calibration, and do any rate."""

SPAN = CrossLayerTransform.__name__
"""The method across layers, which needs a calibration of spans."""

NAMES = (*_RATES, TRANSFORM, SPAN)


def supports(name: str, bits: float) -> bool:
    """Whether a method, one of `NAMES`, has settings for a rate."""
    ranges = {TRANSFORM: (0.25, 8.0), SPAN: (0.05, 2.0)}
    if name in ranges:
        low, high = ranges[name]
        return low <= bits <= high
    return bits in _RATES[name][1]


def compressors(
    name: str,
    bits: float,
    calibration: Calibration | None,
    spans: CrossLayerCalibration | None = None,
    **options: Any,
) -> Callable[[int], KVCacheCompressor]:
    """Return the compressor of every layer at a rate that the method supports.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    bits : float
        Bits of a code per value; scales, gains and bases come on top, norms of a plan do not.
    calibration : Calibration or None
        With it, `TransformCoding` is what `plan` makes of it; without, it uses own moments.
    spans : CrossLayerCalibration or None
        What `CrossLayerTransform` is trained on.
    **options
        Of `KVCacheCompressor`.
    """
    if name == TRANSFORM and calibration is not None:
        planned = plan(calibration, bits=bits, **options)
        return lambda layer: planned[layer]
    if name == SPAN and spans is not None:
        together = KVCacheCompressor(spans.train(bits), **options)
        return lambda _: together
    method = TransformCoding(bits) if name == TRANSFORM else _RATES[name][0](int(bits))
    compressor = KVCacheCompressor(method, **options)
    return lambda _: compressor
