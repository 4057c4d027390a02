"""What methods do to keys and values: rows of `kvcompress compare`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from kvcompress.arrays import Array, HostArray, to_host
from kvcompress.cli.files import Layer
from kvcompress.cli.libraries import Library, median_time
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.evaluation.metrics import attention, relative_error, relative_mse
from kvcompress.methods import Method


@dataclass(frozen=True)
class Result:
    """What one method did to all layers; errors are means over the layers.

    Attributes
    ----------
    bits_per_value, ratio : float
        As in `CompressedKV`, over all layers.
    key_relative_mse, value_relative_mse : float
    attention_relative_error : float or None
        None without queries.
    compress_mb_per_s, decompress_mb_per_s : float
        Megabytes (1e6) of the original keys and values per second.
    """

    method: Method
    bits_per_value: float
    ratio: float
    key_relative_mse: float
    value_relative_mse: float
    attention_relative_error: float | None
    compress_mb_per_s: float
    decompress_mb_per_s: float


def measured(
    compressors: Iterable[tuple[Method, KVCacheCompressor]],
    layers: Sequence[Layer],
    library: Library,
) -> Iterator[Result]:
    """Do every method, by its compressor, to all layers."""
    arrays = [(library.array(_batched(x.k)), library.array(_batched(x.v))) for x in layers]
    outputs = [None if x.q is None else attention(x.q, x.k, x.v) for x in layers]
    for method, compressor in compressors:
        yield _result(method, compressor, layers, arrays, outputs, library)


def _result(
    method: Method,
    compressor: KVCacheCompressor,
    layers: Sequence[Layer],
    arrays: Sequence[tuple[Array, Array]],
    outputs: Sequence[HostArray | None],
    library: Library,
) -> Result:
    compress = library.compile(compressor.compress_kv)
    decompress = library.compile(compressor.decompress_kv)
    compress_time, compressed = median_time(
        lambda: [compress(k, v) for k, v in arrays], repeat=5, budget=0.3
    )
    decompress_time, decompressed = median_time(
        lambda: [decompress(c) for c in compressed], repeat=5, budget=0.3
    )
    restored = [
        (to_host(k).reshape(layer.k.shape), to_host(v).reshape(layer.v.shape))
        for layer, (k, v) in zip(layers, decompressed, strict=True)
    ]
    errors = [
        relative_error(output, attention(layer.q, *kv))
        for layer, output, kv in zip(layers, outputs, restored, strict=True)
        if layer.q is not None and output is not None
    ]
    nbytes = sum(c.nbytes for c in compressed)
    original = sum(c.original_nbytes for c in compressed)
    values = sum(layer.k.size + layer.v.size for layer in layers)
    return Result(
        method=method,
        bits_per_value=8 * nbytes / values,
        ratio=original / nbytes,
        key_relative_mse=fmean(
            relative_mse(layer.k, k) for layer, (k, _) in zip(layers, restored, strict=True)
        ),
        value_relative_mse=fmean(
            relative_mse(layer.v, v) for layer, (_, v) in zip(layers, restored, strict=True)
        ),
        attention_relative_error=fmean(errors) if errors else None,
        compress_mb_per_s=original / compress_time / 1e6,
        decompress_mb_per_s=original / decompress_time / 1e6,
    )


def _batched(x: HostArray) -> HostArray:
    return x.reshape((-1, *x.shape[-3:]))
