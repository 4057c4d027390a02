"""What methods at their rates do to the predictions of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompress.arrays import HostArray, to_host
from kvcompress.compressed import CompressedCache
from kvcompress.evaluation.metrics import rate_bound
from kvcompress.evaluation.rates import CacheCompressor

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
    compressor : KVCacheCompressor or Plan
    sinks, window : int
        First and last tokens that it keeps exact.
    """

    method: str
    bits: float
    compressor: CacheCompressor
    sinks: int
    window: int


@dataclass(frozen=True)
class _Sizes:
    """Sums over caches of what `CompressedCache` counts."""

    coded_nbytes: int
    num_coded: int
    nbytes: int
    num_values: int

    @classmethod
    def of(cls, *caches: CompressedCache | _Sizes) -> _Sizes:
        """Add caches, or sums, up."""
        return cls(*(sum(getattr(x, field.name) for x in caches) for field in fields(cls)))


@dataclass
class Tally:
    """What a row did to the sequences so far."""

    sizes: list[_Sizes] = field(default_factory=list)
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
        Coded bits above `rate_bound`, the mean over layers and sequences.
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
    keys, values = zip(*continuation.kv.values(), strict=True)
    compressed = row.compressor.compress_cache(keys, values)
    pairs = zip(*row.compressor.decompress_cache(compressed), strict=True)
    restored = dict(zip(continuation.kv, pairs, strict=True))
    # Of what was compressed, the sizes are all that is asked later.
    tally.sizes.append(_Sizes.of(compressed))
    for layer, pair in restored.items():
        tally.bounds.append(_bound(continuation, layer, pair, row))
    tally.scores.append(continuation.score(restored))


def _bound(continuation: Continuation, layer: int, restored: tuple[Any, Any], row: Row) -> float:
    """`rate_bound` of the coded tokens of a layer."""
    original, tokens = continuation.kv[layer], continuation.kv[layer][0].shape[-2]
    sinks = 0 if layer in continuation.partial else row.sinks
    coded = slice(sinks, max(sinks, tokens - row.window))
    (k, v), (k_restored, v_restored) = (
        [to_host(x[0, :, coded]) for x in pair] for pair in (original, restored)
    )
    queries = to_host(continuation.queries[layer][0])
    return rate_bound(queries, (k, v), (k_restored, v_restored))


def result(row: Row, tally: Tally) -> Result:
    """Sum a row up."""
    sizes = _Sizes.of(*tally.sizes)
    kl, original, nll, same = (
        np.concatenate([getattr(score, name) for score in tally.scores])
        for name in ("kl", "original_nll", "nll", "same_top")
    )
    coded_bits = 8 * sizes.coded_nbytes / sizes.num_coded if sizes.num_coded else math.nan
    return Result(
        method=row.method,
        bits=row.bits,
        coded_bits_per_value=coded_bits,
        bits_per_value=8 * sizes.nbytes / sizes.num_values,
        kl_mean=float(np.mean(kl)),
        kl_p99=float(np.percentile(kl, 99)),
        perplexity_change=100 * math.expm1(float(np.mean(nll - original))),
        top1_agreement=float(np.mean(same)),
        attention_relative_error=fmean(
            error for score in tally.scores for error in score.attention_error.values()
        ),
        bits_over_bound=coded_bits - fmean(tally.bounds),
    )
