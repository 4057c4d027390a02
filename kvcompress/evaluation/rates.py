"""What compresses a cache at so many bits per value, by any method and calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, TypeAlias

from kvcompress.arrays import Array
from kvcompress.calibration.calibration import FORMAT as CALIBRATION
from kvcompress.calibration.calibration import Calibration
from kvcompress.compressed import CompressedCache
from kvcompress.compressor import KVCacheCompressor
from kvcompress.cross_layer.calibration import FORMAT as CROSS_LAYER_CALIBRATION
from kvcompress.cross_layer.calibration import CrossLayerCalibration
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.errors import CalibrationError
from kvcompress.files import format_of
from kvcompress.methods import TransformCoding, known_cache_methods, known_methods
from kvcompress.plan import plan

AnyCalibration: TypeAlias = Calibration | CrossLayerCalibration


class CacheCompressor(Protocol):
    """What compresses and restores whole caches: a `KVCacheCompressor` or a `Plan`."""

    def compress_cache(self, keys: Sequence[Array], values: Sequence[Array], /) -> CompressedCache:
        """See `KVCacheCompressor.compress_cache`."""

    def decompress_cache(self, compressed: CompressedCache, /) -> tuple[list[Array], list[Array]]:
        """See `KVCacheCompressor.decompress_cache`."""


def _planned(calibration: Any, bits: float, options: Mapping[str, Any]) -> CacheCompressor:
    return plan(calibration, bits=bits, **options)


def _trained(calibration: Any, bits: float, options: Mapping[str, Any]) -> CacheCompressor:
    return KVCacheCompressor(calibration.train(bits), **options)


_CALIBRATED: Mapping[
    str, tuple[type[Any], str, Callable[[Any, float, Mapping[str, Any]], CacheCompressor]]
] = {
    TransformCoding.identifier: (Calibration, CALIBRATION, _planned),
    CrossLayerTransform.identifier: (CrossLayerCalibration, CROSS_LAYER_CALIBRATION, _trained),
}
"""Of methods with calibrations: their class, their format, and what one makes of them."""

CALIBRATIONS = {name: kind for name, (kind, _, _) in _CALIBRATED.items()}
"""Classes of calibrations by the identifier of the method that they are for."""


def names() -> tuple[str, ...]:
    """Identifiers of the methods that can be asked for a rate."""
    methods = [name for name, cls in known_methods().items() if "at_bits" in vars(cls)]
    return (*methods, *known_cache_methods())


def supports(name: str, bits: float) -> bool:
    """Tell whether a method, one of `names`, has settings for a rate."""
    if name in known_methods():
        return known_methods()[name].at_bits(bits) is not None
    low, high = known_cache_methods()[name].rates
    return low <= bits <= high


def load_calibration(path: str | PathLike[str]) -> tuple[str, AnyCalibration]:
    """Read a calibration of any kind.

    Returns
    -------
    name : str
        Identifier of the method that it is for.
    calibration : Calibration or CrossLayerCalibration

    Raises
    ------
    CalibrationError
        If it is not a file of a calibration.
    """
    found = format_of(path)
    for name, (kind, form, _) in _CALIBRATED.items():
        if found == form:
            return name, kind.load(path)
    known = ", ".join(form for _, form, _ in _CALIBRATED.values())
    raise CalibrationError(f"{path} is not a calibration: its format is {found!r}, not {known}")


def compressor(
    name: str, bits: float, calibrations: Mapping[str, AnyCalibration], **options: Any
) -> CacheCompressor:
    """Return what compresses caches by a method, at a rate that it supports.

    Parameters
    ----------
    name : str
        One of `names`.
    bits : float
        Bits of a code per value; scales, gains and bases come on top, norms of a plan do not.
    calibrations : mapping of str to calibration
        By the identifier of the method that each is for. Without one, a `Method` does without.
    **options
        Of `KVCacheCompressor`.

    Raises
    ------
    CalibrationError
        If a `CacheMethod` has no calibration.
    """
    if name in calibrations:
        _, _, make = _CALIBRATED[name]
        return make(calibrations[name], bits, options)
    method = known_methods()[name].at_bits(bits) if name in known_methods() else None
    if method is None:
        raise CalibrationError(f"{name} needs a calibration for {bits:g} bits per value")
    return KVCacheCompressor(method, **options)
