"""What methods at their rates do to a model: rows of `kvcompress evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompress.arrays import HostArray, to_host
from kvcompress.compressed.kv import CompressedKV
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.evaluation.metrics import rate_bound

if TYPE_CHECKING:
    from kvcompress.evaluation.continuation import Continuation, Score
    from kvcompress.integrations.transformers import LanguageModel


@dataclass(frozen=True)
class Row:
    """A method at a rate.

    Attributes
    ----------
    method : str
    bits : float
        As asked for.
    compressor : callable
        From a layer to its compressor.
    """

    method: str
    bits: float
    compressor: Callable[[int], KVCacheCompressor]


@dataclass
class Tally:
    """What a row did to the sequences so far."""

    compressed: list[tuple[int, int, int, int]] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What one method did at one rate.

    Attributes
    ----------
    method : str
    bits : float
        As asked for.
    coded_bits_per_value, bits_per_value : float
        As in `CompressedKV`, over all layers.
    kl_mean, kl_p99 : float
        Nats per token.
    perplexity_change : float
        In percent of the original cache's.
    top1_agreement : float
        0 to 1.
    attention_relative_error : float
        Mean over layers and sequences.
    bits_over_bound : float
        Coded bits above `kvcompress.evaluation.metrics.rate_bound`, the mean over layers and
        sequences.
    """

    method: str
    bits: float
    coded_bits_per_value: float
    bits_per_value: float
    kl_mean: float
    kl_p99: float
    perplexity_change: float
    top1_agreement: float
    attention_relative_error: float
    bits_over_bound: float


@dataclass(frozen=True)
class Report:
    """All rows on one text, and the perplexity on the original cache."""

    text: str
    perplexity: float
    results: list[Result]


def score(
    lm: LanguageModel,
    places: HostArray,
    prefix: int,
    rows: Sequence[Row],
    tallies: Sequence[Tally],
) -> Iterator[None]:
    """Do every row on every sequence of token ids, ``places [sequences, tokens]``."""
    from kvcompress.evaluation.continuation import Continuation

    for tokens in places:
        continuation = Continuation(lm, tokens, prefix=prefix)
        for row, tally in zip(rows, tallies, strict=True):
            _step(continuation, row, tally)
            yield


def _step(continuation: Continuation, row: Row, tally: Tally) -> None:
    restored = {}
    if isinstance(row.compressor(0).method, CrossLayerTransform):
        restored = _together(continuation, row.compressor(0), tally)
    else:
        for layer, (k, v) in continuation.kv.items():
            compressor = row.compressor(layer)
            if layer in continuation.partial:
                compressor = replace(compressor, sinks=0)
            compressed = compressor.compress_kv(k, v)
            tally.compressed.append(_sizes(compressed))
            restored[layer] = compressor.decompress_kv(compressed)
    for layer, pair in restored.items():
        tally.bounds.append(_bound(continuation, layer, pair, row.compressor(layer)))
    tally.scores.append(continuation.score(restored))


def _together(
    continuation: Continuation, compressor: KVCacheCompressor, tally: Tally
) -> dict[int, tuple[Any, Any]]:
    """Restored layers of a compressor that takes them all at once."""
    keys, values = zip(*continuation.kv.values(), strict=True)
    compressed = compressor.compress_cache(keys, values)
    sizes = compressed.coded_nbytes, compressed.num_coded
    tally.compressed.append((*sizes, compressed.nbytes, compressed.num_values))
    pairs = zip(*compressor.decompress_cache(compressed), strict=True)
    return dict(zip(continuation.kv, pairs, strict=True))


def _bound(
    continuation: Continuation, layer: int, restored: tuple[Any, Any], compressor: KVCacheCompressor
) -> float:
    """`rate_bound` of the coded tokens of a layer."""
    original, tokens = continuation.kv[layer], continuation.kv[layer][0].shape[-2]
    sinks = 0 if layer in continuation.partial else compressor.sinks
    coded = slice(sinks, max(sinks, tokens - compressor.window))
    (k, v), (k_restored, v_restored) = (
        [to_host(x[0, :, coded]) for x in pair] for pair in (original, restored)
    )
    queries = to_host(continuation.queries[layer][0])
    return rate_bound(queries, (k, v), (k_restored, v_restored))


def _sizes(compressed: CompressedKV) -> tuple[int, int, int, int]:
    """Bytes and values, coded and all."""
    tensors = compressed.keys, compressed.values
    return (
        sum(x.coded_nbytes for x in tensors),
        sum(x.num_coded for x in tensors),
        sum(x.nbytes for x in tensors),
        sum(x.num_values for x in tensors),
    )


def result(row: Row, tally: Tally) -> Result:
    """Sum a row up."""
    coded_bytes, coded, nbytes, values = map(sum, zip(*tally.compressed, strict=True))
    kl, original, nll, same = (
        np.concatenate([getattr(score, name) for score in tally.scores])
        for name in ("kl", "original_nll", "nll", "same_top")
    )
    coded_bits = 8 * coded_bytes / coded if coded else math.nan
    return Result(
        method=row.method,
        bits=row.bits,
        coded_bits_per_value=coded_bits,
        bits_per_value=8 * nbytes / values,
        kl_mean=float(np.mean(kl)),
        kl_p99=float(np.percentile(kl, 99)),
        perplexity_change=100 * math.expm1(float(np.mean(nll - original))),
        top1_agreement=float(np.mean(same)),
        attention_relative_error=fmean(
            error for score in tally.scores for error in score.attention_error.values()
        ),
        bits_over_bound=coded_bits - fmean(tally.bounds),
    )
