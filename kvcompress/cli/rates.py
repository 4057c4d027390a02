"""Which settings of a method make how many bits per value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvcompress.calibration import Calibration, plan
from kvcompress.compressor import KVCacheCompressor
from kvcompress.errors import UnknownLayer
from kvcompress.methods import GroupQuantization, Method, RotatedQuantization, TransformCoding
from kvcompress.methods.group_quantization import BITS

CALIBRATED = TransformCoding.__name__
"""The method that needs a calibration."""

_UNCALIBRATED: Mapping[str, tuple[Callable[[int], Method], tuple[int, ...]]] = {
    GroupQuantization.__name__: (GroupQuantization, BITS),
    RotatedQuantization.__name__: (RotatedQuantization, tuple(range(1, 9))),
}

NAMES = (*_UNCALIBRATED, CALIBRATED)


def compressors(
    name: str, bits: float, calibration: Calibration | None, **options: Any
) -> Callable[[int], KVCacheCompressor] | None:
    """Return the compressor of every layer at a rate; None if the method has no such rate.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    bits : float
        Bits of a code per value; scales and norms come on top, except for `TransformCoding`.
    calibration : Calibration or None
        For `TransformCoding`, whose bits `plan` spreads over the layers.
    **options
        Of `KVCacheCompressor`.
    """
    if name == CALIBRATED:
        if calibration is None or not 0.25 <= bits <= 8:
            return None
        return _by_layer(plan(calibration, bits=bits, **options))
    method, known = _UNCALIBRATED[name]
    if bits not in known:
        return None
    compressor = KVCacheCompressor(method(int(bits)), **options)
    return lambda _: compressor


def _by_layer(planned: Mapping[int, KVCacheCompressor]) -> Callable[[int], KVCacheCompressor]:
    def compressor(layer: int) -> KVCacheCompressor:
        if layer not in planned:
            raise UnknownLayer(
                f"the calibration knows layers {list(planned)}, the cache has layer {layer}"
            )
        return planned[layer]

    return compressor
