"""``kvcompress evaluate``: what compressed caches do to a model, against bits per value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.table import Table

import kvcompress
from kvcompress.arrays import HostArray
from kvcompress.cli.console import InputError, print_json, progress, results_table, stdout
from kvcompress.cli.curve import plot_curves
from kvcompress.cli.figure import check_plot
from kvcompress.cli.model import load_model, read_text
from kvcompress.cli.options import chosen, json_option, methods_option, plot_option, text_option
from kvcompress.evaluation.rates import (
    AnyCalibration,
    compressor,
    load_calibration,
    names,
    supports,
)
from kvcompress.evaluation.scoring import Report, Result, Row, Tally, result, score
from kvcompress.methods import CacheMethod, known_cache_methods

if TYPE_CHECKING:
    from kvcompress.integrations.transformers import LanguageModel

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

PARAMETERS = """\
{name}, {bits:g} bits: its parameters, {size:.1f} MB, belong to the model: {share:.1f} % of its
{model:.0f} MB in 16 bits. {tokens:,.0f} tokens save as much."""


@click.command()
@click.argument("model")
@text_option("Text to predict (repeatable: each by itself).")
@click.option(
    "--calibration",
    "calibrations",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="CAL",
    help="What kvcompress calibrate wrote (repeatable: one of each kind).",
)
@methods_option(names())
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
@json_option
@plot_option("Draw KL against bits (.png, .svg, .pdf).")
def evaluate(
    model: str,
    texts: tuple[Path, ...],
    calibrations: tuple[Path, ...],
    methods: str | None,
    bits: str,
    as_json: bool,
    plot: Path | None,
    **lengths: int,
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
    """  # noqa: D301 (click keeps the lines after \b)
    if plot:
        check_plot(plot)
    contents = [read_text(text) for text in texts]
    known = dict(load_calibration(_existing(path)) for path in calibrations)
    settings = _settings(methods, bits, known)
    run = _Run(**lengths)
    lm = load_model(model)
    places = [
        _places(lm.chunks(content, run.prefix + run.scored + 1), run.sequences, text)
        for content, text in zip(contents, texts, strict=True)
    ]
    rows = [run.row(*pair, known) for pair in progress(settings, len(settings), "training")]
    reports = run.reports(lm, rows, dict(zip([text.name for text in texts], places, strict=True)))
    title = f"{Path(model).name}: {run.sequences} x {run.scored} tokens after {run.prefix}"
    if plot:
        plot_curves(reports, plot, title)
    if as_json:
        facts = {
            "kvcompress": kvcompress.__version__,
            "model": Path(model).name,
            "calibrations": {name: found.fingerprint for name, found in known.items()},
            **asdict(run),
            "dtype": lm.cache_dtype,
            "texts": [asdict(report) for report in reports],
        }
        print_json(facts)
        return
    for report in reports:
        perplexity = f"{report.text}, perplexity {report.perplexity:.2f}"
        caption = "\n".join([CAPTION, *_parameters(rows, report.results, lm.nbytes)])
        stdout().print(_table(report.results, f"{title}\n{perplexity}", caption))


@dataclass(frozen=True)
class _Run:
    """Numbers of tokens and places; see the options of the command."""

    prefix: int
    scored: int
    sequences: int
    sinks: int
    window: int

    def row(self, name: str, bits: float, calibrations: Mapping[str, AnyCalibration]) -> Row:
        """Train a method for a rate."""
        exact = {"sinks": self.sinks, "window": self.window}
        return Row(name, bits, compressor(name, bits, calibrations, **exact), **exact)

    def reports(
        self, lm: LanguageModel, rows: Sequence[Row], places: Mapping[str, HostArray]
    ) -> list[Report]:
        """Do every row on sequences of every text, ``places [sequences, tokens]``."""
        tallies = {text: [Tally() for _ in rows] for text in places}
        steps = (
            step
            for text, chunks in places.items()
            for step in score(lm, chunks, self.prefix, rows, tallies[text])
        )
        for _ in progress(steps, len(places) * self.sequences * len(rows), "evaluating"):
            pass
        reports = []
        for text, tally in tallies.items():
            results = [result(*pair) for pair in zip(rows, tally, strict=True)]
            original = math.exp(float(np.mean([s.original_nll for s in tally[0].scores])))
            reports.append(Report(text, original, results))
        return reports


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def _settings(
    methods: str | None, bits: str, calibrations: Mapping[str, AnyCalibration]
) -> list[tuple[str, float]]:
    """Methods and rates to run; those that need a calibration that is not given are left out."""
    asked = chosen(methods, names())
    lacking = [name for name in asked if name in known_cache_methods() and name not in calibrations]
    if lacking and methods is not None:
        raise InputError(
            f"{lacking[0]} needs a --calibration that kvcompress calibrate "
            f"--method {lacking[0]} wrote"
        )
    asked = [name for name in asked if name not in lacking]
    settings = [(name, rate) for name in asked for rate in _rates(bits) if supports(name, rate)]
    if not settings:
        raise InputError(f"none of {', '.join(asked)} can do any of --bits {bits}")
    return settings


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


def _parameters(rows: Sequence[Row], results: Sequence[Result], model: int) -> list[str]:
    """What the parameters of cache methods weigh against a model of so many bytes."""
    lines = []
    for row, found in zip(rows, results, strict=True):
        method = getattr(row.compressor, "method", None)
        if isinstance(method, CacheMethod):
            line = PARAMETERS.format(
                name=row.method,
                bits=row.bits,
                size=method.nbytes / 1e6,
                share=100 * method.nbytes / model,
                model=model / 1e6,
                tokens=8 * method.nbytes / (method.num_values * (16 - found.coded_bits_per_value)),
            )
            lines.append(line)
    return lines


def _table(results: Sequence[Result], title: str, caption: str) -> Table:
    return results_table(
        (
            (name, [_cells(row) for row in group])
            for name, group in groupby(results, lambda row: row.method)
        ),
        headings=HEADINGS,
        title=title,
        caption=caption,
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
