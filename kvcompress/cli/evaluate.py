"""``kvcompress evaluate``: what compressed caches do to a model, against bits per value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.table import Table

import kvcompress
from kvcompress._namespace import to_host
from kvcompress.calibration import Calibration
from kvcompress.cli.console import InputError, progress, results_table, stdout
from kvcompress.cli.curve import plot_curve
from kvcompress.cli.model import load_model, read_text
from kvcompress.cli.plot import check_plot
from kvcompress.cli.rates import NAMES, TRANSFORM, compressors
from kvcompress.compressed import CompressedKV
from kvcompress.compressor import KVCacheCompressor
from kvcompress.metrics import HostArray, rate_bound

if TYPE_CHECKING:
    from kvcompress.integrations.transformers import Continuation, LanguageModel, Score

HEADINGS = (
    "method",
    "coded\nbits",
    "all-in\nbits",
    "KL\nmean",
    "KL\n99 %",
    "perplexity\n%",
    "top-1\nsame %",
    "attn.\nerror",
    "over\nbound",
)
CAPTION = """\
Bits per value: coded without, all-in with the tokens kept exact; scales and
norms included, calibrated bases and codebooks not. KL: of the next-token
distribution from the original cache's, nats per token; mean and 99th
percentile. Perplexity: change. Top-1: tokens whose most likely next token
stays. Attention error: |o - o'| / |o| of the attention output, for the
queries of the scored tokens, mean over the layers. Over bound: coded bits
above what normal sources of the same covariances need for the same error
of logits and values."""


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
        Coded bits above `kvcompress.metrics.rate_bound`, the mean over layers and sequences.
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


@click.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Text to predict.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="CAL",
    help=f"What kvcompress calibrate wrote, for {TRANSFORM}; without, it uses own moments.",
)
@click.option("--methods", metavar="A,B", help=f"Only these of {', '.join(NAMES)}.")
@click.option("--bits", default="1,1.5,2,3,4", show_default=True, help="Rates, where a method can.")
@click.option(
    "--prefix", type=click.IntRange(1), default=1536, show_default=True, help="Tokens compressed."
)
@click.option(
    "--scored", type=click.IntRange(1), default=512, show_default=True, help="Tokens predicted."
)
@click.option(
    "--sequences",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Places in the text, evenly spread.",
)
@click.option(
    "--sinks", type=click.IntRange(0), default=4, show_default=True, help="First tokens kept exact."
)
@click.option(
    "--window",
    type=click.IntRange(0),
    default=128,
    show_default=True,
    help="Last tokens kept exact.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Draw KL against bits (.png, .svg, .pdf).",
)
def evaluate(
    model: str,
    text: Path,
    calibration: Path | None,
    methods: str | None,
    bits: str,
    prefix: int,
    scored: int,
    sequences: int,
    sinks: int,
    window: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure what compressing its cache does to a MODEL.

    MODEL is a directory, a name on the Hugging Face hub, or a .gguf file. Needs the extra hf.
    The model reads a prefix of the text; its cache, in float16 (bfloat16 for models saved in that),
    is compressed and restored, and the model predicts the tokens that follow, always reading the
    true ones. Layers with a sliding window that have lost the first tokens keep no sinks.

    \b
    Examples:
      kvcompress evaluate ./model --text held-out.txt
      kvcompress evaluate model.gguf --text held-out.txt --calibration model.cal \\
          --bits 2,3,4 --plot quality.png
    """  # noqa: D301
    if plot:
        check_plot(plot)
    content = read_text(text)
    known = Calibration.load(_existing(calibration)) if calibration else None
    names, rates = _names(methods), _rates(bits)
    rows = [
        Row(name, rate, chosen)
        for name in names
        for rate in rates
        if (chosen := compressors(name, rate, known, sinks=sinks, window=window))
    ]
    if not rows:
        raise InputError(f"none of {', '.join(names)} can do any of --bits {bits}")
    lm = load_model(model)
    places = _places(lm.chunks(content, prefix + scored + 1), sequences, text)
    tallies = [Tally() for _ in rows]
    steps = progress(
        _steps(lm, places, prefix, rows, tallies), len(places) * len(rows), "evaluating"
    )
    for _ in steps:
        pass
    results = [_result(row, tally) for row, tally in zip(rows, tallies, strict=True)]
    original = math.exp(float(np.mean([s.original_nll for s in tallies[0].scores])))
    title = (
        f"{Path(model).name}, {text.name}\n{sequences} x {scored} tokens after {prefix}, "
        f"perplexity {original:.2f}"
    )
    if plot:
        plot_curve(results, plot, title)
    if as_json:
        facts = {
            "kvcompress": kvcompress.__version__,
            "model": Path(model).name,
            "text": text.name,
            "calibration": known.fingerprint if known else None,
            "prefix": prefix,
            "scored": scored,
            "sequences": sequences,
            "sinks": sinks,
            "window": window,
            "dtype": lm.cache_dtype,
            "perplexity": original,
            "results": [_as_json(result) for result in results],
        }
        click.echo(json.dumps(facts, indent=2, allow_nan=False))
    else:
        stdout().print(_table(results, title))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def _names(methods: str | None) -> Sequence[str]:
    if methods is None:
        return NAMES
    known = {name.lower(): name for name in NAMES}
    asked = [name.strip() for name in methods.split(",")]
    for name in asked:
        if name.lower() not in known:
            raise InputError(f"unknown method {name!r}; known: {', '.join(NAMES)}")
    return list(dict.fromkeys(known[name.lower()] for name in asked))


def _rates(bits: str) -> list[float]:
    try:
        rates = [float(rate) for rate in bits.split(",")]
    except ValueError:
        raise InputError(f"--bits must be numbers such as 1.5,2,3; got {bits!r}") from None
    return list(dict.fromkeys(rates))


def _places(chunks: HostArray, count: int, text: Path) -> HostArray:
    if len(chunks) < count:
        raise InputError(
            f"{text} holds {len(chunks)} sequences of {chunks.shape[1]} tokens, fewer than {count}"
        )
    return chunks[(2 * np.arange(count) + 1) * len(chunks) // (2 * count)]


def _steps(
    lm: LanguageModel,
    places: HostArray,
    prefix: int,
    rows: Sequence[Row],
    tallies: Sequence[Tally],
) -> Iterator[None]:
    """Do every row on every sequence."""
    from kvcompress.integrations.transformers import Continuation

    for tokens in places:
        continuation = Continuation(lm, tokens, prefix=prefix)
        for row, tally in zip(rows, tallies, strict=True):
            _step(continuation, row, tally)
            yield


def _step(continuation: Continuation, row: Row, tally: Tally) -> None:
    restored = {}
    for layer, (k, v) in continuation.kv.items():
        compressor = row.compressor(layer)
        if layer in continuation.partial:
            compressor = replace(compressor, sinks=0)
        compressed = compressor.compress_kv(k, v)
        tally.compressed.append(_sizes(compressed))
        restored[layer] = compressor.decompress_kv(compressed)
        tally.bounds.append(_bound(continuation, layer, restored[layer], compressor))
    tally.scores.append(continuation.score(restored))


def _bound(
    continuation: Continuation, layer: int, restored: tuple[Any, Any], compressor: KVCacheCompressor
) -> float:
    """`rate_bound` of the coded tokens of a layer."""
    original, tokens = continuation.kv[layer], continuation.kv[layer][0].shape[-2]
    coded = slice(compressor.sinks, max(compressor.sinks, tokens - compressor.window))
    pairs = [tuple(to_host(x[0, :, coded]) for x in pair) for pair in (original, restored)]
    return rate_bound(to_host(continuation.queries[layer][0]), *pairs)


def _sizes(compressed: CompressedKV) -> tuple[int, int, int, int]:
    """Bytes and values, coded and all."""
    tensors = compressed.keys, compressed.values
    return (
        sum(x.coded_nbytes for x in tensors),
        sum(x.num_coded for x in tensors),
        sum(x.nbytes for x in tensors),
        sum(x.num_values for x in tensors),
    )


def _result(row: Row, tally: Tally) -> Result:
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


def _as_json(result: Result) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(result).items()
    }


def _table(results: Sequence[Result], title: str) -> Table:
    return results_table(
        (
            (name, [_cells(result) for result in group])
            for name, group in groupby(results, lambda result: result.method)
        ),
        headings=HEADINGS,
        title=title,
        caption=CAPTION,
    )


def _cells(result: Result) -> list[str]:
    return [
        f"bits={result.bits:g}",
        f"{result.coded_bits_per_value:.2f}",
        f"{result.bits_per_value:.2f}",
        f"{result.kl_mean:.2g}",
        f"{result.kl_p99:.2g}",
        f"{result.perplexity_change:+.2f}",
        f"{100 * result.top1_agreement:.1f}",
        f"{result.attention_relative_error:.2g}",
        f"{result.bits_over_bound:.2f}",
    ]
