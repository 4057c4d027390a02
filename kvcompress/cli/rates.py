"""Which settings of a method make how many bits per value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvcompress.calibration import Calibration
from kvcompress.compressor import KVCacheCompressor
from kvcompress.methods import GroupQuantization, Method, RotatedQuantization, TransformCoding
from kvcompress.methods.group_quantization import BITS
from kvcompress.plan import Plan, plan

_RATES: Mapping[str, tuple[Callable[[Any], Method], tuple[int, ...]]] = {
    GroupQuantization.__name__: (GroupQuantization, BITS),
    RotatedQuantization.__name__: (RotatedQuantization, tuple(range(1, 9))),
}

TRANSFORM = TransformCoding.__name__
"""The method that can use a calibration, and do any rate."""

NAMES = (*_RATES, TRANSFORM)


def compressors(
    name: str, bits: float, calibration: Calibration | None, **options: Any
) -> Callable[[int], KVCacheCompressor] | None:
    """Return the compressor of every layer at a rate; None if the method has no such rate.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    bits : float
        Bits of a code per value; scales, gains and bases come on top, norms of a plan do not.
    calibration : Calibration or None
        With it, `TransformCoding` is what `plan` makes of it; without, it uses own moments.
    **options
        Of `KVCacheCompressor`.
    """
    if name == TRANSFORM:
        if not 0.25 <= bits <= 8:
            return None
        if calibration is not None:
            return _by_layer(plan(calibration, bits=bits, **options))
        return _always(KVCacheCompressor(TransformCoding(bits), **options))
    method, known = _RATES[name]
    return _always(KVCacheCompressor(method(int(bits)), **options)) if bits in known else None


def _always(compressor: KVCacheCompressor) -> Callable[[int], KVCacheCompressor]:
    return lambda _: compressor


def _by_layer(planned: Plan) -> Callable[[int], KVCacheCompressor]:
    return lambda layer: planned[layer]
