"""`plan`: a compressor for every layer, bits spread by the distortion to be expected; its file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from typing import Any

from kvcompress.arrays import HostArray
from kvcompress.calibration.calibration import Calibration
from kvcompress.calibration.parameters import LayerParameters
from kvcompress.calibration.training import Scope, key_bases, rates, value_bases, water_level
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.errors import (
    CalibrationError,
    KVCompressError,
    SettingError,
    UnknownLayer,
    check_fraction,
)
from kvcompress.files import flatten, load_arrays, save_arrays, unflatten
from kvcompress.methods.transform_coding import EXACT, TransformCoding

FORMAT = "kvcompress.plan.2"

_SAVED = ("sinks", "window", "nonfinite")
"""Options of a compressor that belong to the plan, and not to the machine."""


class Plan(Mapping[int, KVCacheCompressor]):
    """The compressors of a model's layers, trained: all that compressing and restoring need.

    A mapping from layer to `KVCacheCompressor`. Made by `plan`, once; saved, and loaded wherever
    the model runs, it gives the same bytes and restores them.
    """

    def __init__(self, compressors: Mapping[int, KVCacheCompressor]) -> None:
        self._compressors = dict(sorted(compressors.items()))

    def __getitem__(self, layer: int) -> KVCacheCompressor:
        if layer not in self._compressors:
            raise UnknownLayer(f"the plan has layers {list(self._compressors)}, not {layer!r}")
        return self._compressors[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._compressors

    def __iter__(self) -> Iterator[int]:
        return iter(self._compressors)

    def __len__(self) -> int:
        return len(self._compressors)

    def __repr__(self) -> str:
        bits = [c.method.bits for c in self.values() if isinstance(c.method, TransformCoding)]
        low, high = min(bits, default=0), max(bits, default=0)
        return f"Plan({len(self)} layers, {low:.3g} to {high:.3g} bits)"

    def save(self, path: str | PathLike[str], /) -> None:
        """Write a safetensors file: bases, codebooks and settings, but no statistics."""
        arrays: dict[int, Mapping[str, HostArray]] = {}
        layers: dict[str, Any] = {}
        for layer, compressor in self.items():
            method = compressor.method
            if not isinstance(method, TransformCoding) or method.parameters is None:
                raise CalibrationError(f"layer {layer} has no calibration, so nothing to save")
            arrays[layer] = method.parameters.arrays
            options = {name: getattr(compressor, name) for name in _SAVED}
            settings = {"bits": method.bits, "exact": method.exact, "scope": method.scope}
            layers[str(layer)] = {**settings, "options": options}
        save_arrays(path, flatten(arrays), form=FORMAT, facts={"layers": layers})

    @classmethod
    def load(cls, path: str | PathLike[str], /, *, backend: str | None = None) -> Plan:
        """Read a file that `save` wrote.

        Parameters
        ----------
        path : path
        backend : str, optional
            Of every `KVCacheCompressor`.

        Raises
        ------
        CalibrationError
            If it is no such file.
        """
        arrays, facts = load_arrays(path, form=FORMAT, kind="a plan")
        known = unflatten(arrays)
        try:
            layers = facts["layers"]
            return cls({int(i): _compressor(x, known[i], backend) for i, x in layers.items()})
        except CalibrationError:
            raise
        except (KVCompressError, KeyError, ValueError, TypeError) as error:
            raise CalibrationError(f"{path} is not a plan, or damaged: {error}") from error


def _compressor(
    settings: Mapping[str, Any], arrays: Mapping[str, HostArray], backend: str | None
) -> KVCacheCompressor:
    bits = settings["bits"]
    parameters = LayerParameters.of(bits, arrays)
    method = TransformCoding(bits, parameters, settings["exact"], settings["scope"])
    return KVCacheCompressor(method, backend=backend, **settings["options"])


def plan(
    calibration: Calibration,
    /,
    *,
    bits: float | None = None,
    budget_bytes: int | None = None,
    tokens: int | None = None,
    exact: float = EXACT,
    scope: Scope = "layer",
    **options: Any,
) -> Plan:
    """Spread bits over layers, keys and values by the distortion that errors cause, and train.

    One water level for all coefficients of all layers: those of keys count by the mean square error
    of the logits, those of values by that of the values over their norms.

    Parameters
    ----------
    calibration : Calibration
    bits : float, optional
        Bits per value over the whole cache.
    budget_bytes, tokens : int, optional
        Instead of `bits`: bytes for that many tokens of one sequence in all layers.
    exact : float
        Of every `TransformCoding`; what it costs is part of `bits`.
    scope : {"head", "layer"}
        Of every `TransformCoding`.
    **options
        Of `KVCacheCompressor`, such as `sinks` and `window`; exact tokens come on top.

    Returns
    -------
    Plan

    Raises
    ------
    SettingError
        Unless either `bits`, or `budget_bytes` and `tokens`, are given.
    """
    check_fraction("exact", exact)
    statistics = {layer: calibration[layer] for layer in calibration.layers}
    values = sum(s.key_mean.size + s.value_mean.size for s in statistics.values())
    if budget_bytes is not None and tokens is not None and bits is None:
        bits = 8 * budget_bytes / (tokens * values)
    elif bits is None or budget_bytes is not None or tokens is not None:
        raise SettingError("plan needs either bits, or budget_bytes and tokens")
    distortions = {
        i: (key_bases(s, scope).distortion, value_bases(s, scope).distortion)
        for i, s in statistics.items()
    }
    norms = {i: 8 * len(s.value_mean) for i, s in statistics.items()}
    apart = sum(norms.values()) + sum(
        exact * (16 * keys.size + 32 * len(keys)) for keys, _ in distortions.values()
    )
    level = water_level([x for pair in distortions.values() for x in pair], bits - apart / values)
    methods = {}
    for layer, (keys, vals) in distortions.items():
        spent = rates(keys, level).sum() + rates(vals, level).sum()
        share = min(max(float((spent + norms[layer]) / (keys.size + vals.size)), 0.25), 8.0)
        methods[layer] = TransformCoding(share, statistics[layer], exact, scope)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(lambda method: method.parameters, methods.values()))
    return Plan(
        {
            layer: KVCacheCompressor(replace(method, calibration=parameters), **options)
            for (layer, method), parameters in zip(methods.items(), codes, strict=True)
        }
    )
