"""`plan`: a compressor for every layer, bits spread by the distortion to be expected; its file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from typing import Any

from kvcompress.arrays import Array, HostArray
from kvcompress.backend import select
from kvcompress.calibration.calibration import Calibration
from kvcompress.calibration.parameters import LayerParameters
from kvcompress.calibration.ropes import read_rope
from kvcompress.calibration.statistics import LayerStatistics
from kvcompress.calibration.training import (
    NORMS,
    Scope,
    key_bases,
    rates,
    value_bases,
    water_level,
)
from kvcompress.compressed import CompressedCache
from kvcompress.compressor.cache import CacheCodec
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.errors import (
    CalibrationError,
    SettingError,
    UnknownLayer,
    check_fraction,
)
from kvcompress.files import (
    Facts,
    flatten,
    load_arrays,
    reading,
    require,
    save_arrays,
    unflatten,
)
from kvcompress.files.facts import layer_number
from kvcompress.methods.transform_coding import EXACT, LEAST, MOST, TransformCoding

FORMAT = "kvcompress.plan.4"

_SAVED = ("sinks", "window", "nonfinite")
"""Options of a compressor that belong to the plan, and not to the machine."""

_SETTINGS = ("bits", "exact", "scope")


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

    def compress_cache(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        /,
        *,
        positions: Array | None = None,
    ) -> CompressedCache:
        """Compress the keys and values of all layers, each by its compressor.

        As `KVCacheCompressor.compress_cache`; the layers of the plan, in order, are those that have
        a cache.

        Raises
        ------
        SettingError
            If they are not as many as the layers of the plan; and the errors of `compress_cache`.
        """
        if len(keys) != len(self):
            raise SettingError(f"the plan has {len(self)} layers, got keys of {len(keys)}")
        return self._cache_codec.compress(keys, values, positions)

    def decompress_cache(
        self,
        compressed: CompressedCache,
        /,
        *,
        layers: Sequence[int] | None = None,
        tokens: slice | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """Restore a cache, or a part of it; see `KVCacheCompressor.decompress_cache`.

        Raises
        ------
        LayoutError, UnknownLayer, CalibrationError
        """
        return self._cache_codec.decompress(compressed, layers, tokens)

    @property
    def _cache_codec(self) -> CacheCodec:
        compressors = list(self.values())
        return CacheCodec(lambda i: compressors[i].layer_codec(select(compressors[i].backend)))

    def save(self, path: str | PathLike[str], /) -> None:
        """Write a safetensors file: bases, codebooks and settings, but no statistics.

        Raises
        ------
        FileError
            If it cannot be written.
        CalibrationError
            If a layer has no calibration.
        """
        arrays: dict[int, Mapping[str, HostArray]] = {}
        layers: dict[str, Any] = {}
        for layer, compressor in self.items():
            method = compressor.method
            if not isinstance(method, TransformCoding) or method.parameters is None:
                raise CalibrationError(f"layer {layer} has no calibration, so nothing to save")
            arrays[layer] = method.parameters.arrays
            options = {name: getattr(compressor, name) for name in _SAVED}
            settings = {name: getattr(method, name) for name in _SETTINGS}
            rope = None if method.rope is None else method.rope.to_dict()
            layers[str(layer)] = {**settings, "rope": rope, "options": options}
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
        FileError
            If there is no such file, or it cannot be read.
        CalibrationError
            If it is not such a file, or damaged.
        """
        with reading(path, "a plan"):
            arrays, held = load_arrays(path, form=FORMAT)
            layers = Facts(held, "facts", "layers").object("layers")
            known, settings = unflatten(arrays), dict(layers.items(*_SETTINGS, "rope", "options"))
            require(
                set(known) == set(settings),
                f"settings must be those of layers {list(known)}, got {list(settings)}",
            )
            return cls(
                {
                    layer_number(name): _compressor(settings[name], of_layer, backend)
                    for name, of_layer in known.items()
                }
            )


def _compressor(
    settings: Facts, arrays: Mapping[str, HostArray], backend: str | None
) -> KVCacheCompressor:
    bits = settings.number("bits", LEAST, MOST)
    parameters = LayerParameters.of(bits, arrays)
    exact = settings.number("exact", 0, 1)
    scope: Any = settings.choice("scope", "head", "layer")
    heads, units = len(parameters.log_norm), len(parameters.keys.forward)
    wanted = heads if scope == "head" else 1
    require(units == wanted, f"scope {scope!r} has {wanted} bases of {heads} heads, got {units}")
    rope = read_rope(settings, "rope", parameters.keys.forward.shape[1] * units // heads)
    method = TransformCoding(bits, replace(parameters, rope=rope), exact, scope)
    options = settings.object("options", *_SAVED)
    nonfinite: Any = options.choice("nonfinite", "raise", "saturate")
    return KVCacheCompressor(
        method,
        backend=backend,
        sinks=options.integer("sinks", 0, 1 << 31),
        window=options.integer("window", 0, 1 << 31),
        nonfinite=nonfinite,
    )


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
    """Spread bits over layers, keys and values by the distortion to be expected, and train.

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
        Of `KVCacheCompressor`, such as `sinks` and `window`; exact tokens come on top. `sinks` is
        `Calibration.skip` if left out: what the calibration has not seen is kept exact.

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
    require(values > 0, "the calibration has seen no layer, and so there is none to plan for")
    if budget_bytes is not None and tokens is not None and bits is None:
        bits = 8 * budget_bytes / (tokens * values)
    elif bits is None or budget_bytes is not None or tokens is not None:
        raise SettingError("plan needs either bits, or budget_bytes and tokens")
    shares = _spread(statistics, bits, exact, scope)
    methods = [TransformCoding(shares[i], s, exact, scope) for i, s in statistics.items()]
    options = {"sinks": calibration.skip, **options}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trained = list(pool.map(lambda method: method.parameters, methods))
    return Plan(
        {
            layer: KVCacheCompressor(replace(method, calibration=parameters), **options)
            for layer, method, parameters in zip(statistics, methods, trained, strict=True)
        }
    )


def _spread(
    statistics: Mapping[int, LayerStatistics], bits: float, exact: float, scope: Scope
) -> dict[int, float]:
    """Bits per value for every layer, `bits` on average with norms and exact tokens."""
    distortions = {
        layer: (key_bases(s, scope).distortion, value_bases(s, scope).distortion)
        for layer, s in statistics.items()
    }
    norms = {layer: 8 * NORMS * len(s.value_mean) for layer, s in statistics.items()}
    values = sum(keys.size + vals.size for keys, vals in distortions.values())
    apart = sum(norms.values()) + sum(
        exact * (16 * keys.size + 32 * len(keys)) for keys, _ in distortions.values()
    )
    level = water_level([x for pair in distortions.values() for x in pair], bits - apart / values)
    shares = {}
    for layer, (keys, vals) in distortions.items():
        spent = rates(keys, level).sum() + rates(vals, level).sum() + norms[layer]
        shares[layer] = min(max(float(spent / (keys.size + vals.size)), LEAST), MOST)
    return shares
