"""A small object of every format, how to load it, and what one does with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress import (
    Calibration,
    CrossLayerCalibration,
    CrossLayerTransform,
    KVCacheCompressor,
    Plan,
    RoPE,
    plan,
)
from kvcompress.cross_layer import LayerGroup, LayerShape
from kvcompress.rope.scaling import YarnScaling

HEADS, DIM, VALUE_DIM = 2, 4, 4


@dataclass(frozen=True)
class Format:
    """Files of one format.

    Attributes
    ----------
    files : sequence of bytes
    load : callable
        From a path to what it holds.
    use : callable
        From that, keys and values to arrays that are to be finite.
    """

    files: Sequence[bytes]
    load: Callable[[Path], Any]
    use: Callable[[Any, np.ndarray, np.ndarray], Iterator[np.ndarray]]


def _saved(thing) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x"
        thing.save(path)
        return path.read_bytes()


def draw(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("f4")


def calibration(layers: int) -> Calibration:
    rng, made = np.random.default_rng(0), Calibration(rows=256, skip=1)
    for i in range(layers):
        k, v = draw(rng, 1, HEADS, 300, DIM), draw(rng, 1, HEADS, 300, VALUE_DIM)
        made.update(i, k, v, draw(rng, 1, 2 * HEADS, 90, DIM) if i == 0 else None)
    made.provenance = {"texts": ["a"], "sequences": 3}
    return made


def cross_layer(gradients: bool) -> CrossLayerCalibration:
    rng = np.random.default_rng(1)
    shapes = (LayerShape(1, DIM, 2, RoPE(DIM, scaling=YarnScaling(4.0, 64))), LayerShape(1, 2, 2))
    groups = [LayerGroup((0,), shapes[:1]), LayerGroup((1,), shapes[1:])]
    if gradients:
        groups = [LayerGroup((0, 1), shapes)]
    made = CrossLayerCalibration(groups, rows=256, skip=0)
    ks, vs, dks, dvs = (
        [draw(rng, 1, 1, 300, n) for n in ns] for ns in ((DIM, 2), (2, 2), (DIM, 2), (2, 2))
    )
    made.update(ks, vs, (dks, dvs) if gradients else None)
    return made


def _restore_kv(compressor, k, v):
    return compressor.decompress_kv(compressor.compress_kv(k, v))


def use_plan(known: Plan, k, v) -> Iterator[np.ndarray]:
    repr(known)
    for compressor in known.values():
        parameters = compressor.method.parameters
        heads, units = len(parameters.log_norm), len(parameters.keys.forward)
        dims = (x.forward.shape[1] * units // heads for x in (parameters.keys, parameters.values))
        yield from _restore_kv(compressor, *_fit([k, v], [(heads, dim) for dim in dims]))


def use_calibration(known: Calibration, k, v) -> Iterator[np.ndarray]:
    repr(known)
    yield from use_plan(plan(known, bits=2, scope="layer" if k[0, 0, 0, 0] > 0 else "head"), k, v)


def use_transform(known: CrossLayerTransform, k, v) -> Iterator[np.ndarray]:
    repr(known)
    shapes = {
        layer: shape
        for parameters in known.groups
        for layer, shape in zip(parameters.group.layers, parameters.group.shapes, strict=True)
    }
    compressor = KVCacheCompressor(known, sinks=1)
    wanted = [shapes[i] for i in sorted(shapes)]
    keys, values = (
        _fit([x] * len(wanted), [(s.heads, dim) for s, dim in zip(wanted, dims, strict=True)])
        for x, dims in ((k, [s.key_dim for s in wanted]), (v, [s.value_dim for s in wanted]))
    )
    restored = compressor.decompress_cache(compressor.compress_cache(keys, values))
    yield from (x for xs in restored for x in xs)


def use_cross_layer(known: CrossLayerCalibration, k, v) -> Iterator[np.ndarray]:
    repr(known)
    yield from use_transform(known.train(1.0), k, v)


def _fit(arrays, shapes) -> list[np.ndarray]:
    """Arrays of so many heads and channels, from the numbers of some."""
    return [
        np.resize(x, (1, heads, x.shape[2], dim))
        for x, (heads, dim) in zip(arrays, shapes, strict=True)
    ]


def formats() -> dict[str, Format]:
    """All formats, by the names of their classes."""
    two, one = calibration(2), calibration(1)
    wide, apart = cross_layer(True), cross_layer(False)
    plans = plan(two, bits=2, sinks=2, window=1), plan(one, bits=3, scope="head", exact=0.1)
    transforms = wide.train(1.0), apart.train(2.0)
    return {
        "Calibration": Format([*map(_saved, (one, two))], Calibration.load, use_calibration),
        "Plan": Format([*map(_saved, plans)], Plan.load, use_plan),
        "CrossLayerCalibration": Format(
            [*map(_saved, (wide, apart))], CrossLayerCalibration.load, use_cross_layer
        ),
        "CrossLayerTransform": Format(
            [*map(_saved, transforms)], CrossLayerTransform.load, use_transform
        ),
    }
