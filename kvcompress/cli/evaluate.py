"""``kvcompress evaluate``: what compressed caches do to a model, against bits per value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click
import numpy as np
from rich.table import Table

import kvcompress
from kvcompress.arrays import HostArray
from kvcompress.calibration.calibration import Calibration
from kvcompress.cli.console import InputError, print_json, progress, results_table, stdout
from kvcompress.cli.curve import plot_curves
from kvcompress.cli.figure import check_plot
from kvcompress.cli.model import load_model, read_text
from kvcompress.cli.options import chosen, json_option, methods_option, plot_option, text_option
from kvcompress.cross_layer.calibration import CrossLayerCalibration
from kvcompress.cross_layer.transform import CrossLayerTransform
from kvcompress.evaluation.rates import NAMES, SPAN, TRANSFORM, compressors, supports
from kvcompress.evaluation.scoring import Report, Result, Row, Tally, result, score

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

CODES = """\
CrossLayerTransform, {bits:g} bits: its codes, {size:.1f} MB, belong to the model: {share:.1f} % of
its {model:.0f} MB in 16 bits. {tokens:,.0f} tokens save as much."""


@click.command()
@click.argument("model")
@text_option("Text to predict (repeatable: each by itself).")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="CAL",
    help=f"What kvcompress calibrate wrote, for {TRANSFORM}; without, it uses own moments.",
)
@click.option(
    "--spans",
    type=click.Path(path_type=Path),
    metavar="CAL",
    help=f"What kvcompress calibrate --span model wrote, for {SPAN}.",
)
@methods_option(NAMES)
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
    calibration: Path | None,
    spans: Path | None,
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
    """  # noqa: D301 (click keeps the lines after \b)
    if plot:
        check_plot(plot)
    contents = [read_text(text) for text in texts]
    known = Calibration.load(_existing(calibration)) if calibration else None
    joint = CrossLayerCalibration.load(_existing(spans)) if spans else None
    names, rates = chosen(methods, NAMES), _rates(bits)
    if joint is None:
        if methods is not None and SPAN in names:
            raise InputError(
                f"{SPAN} needs --spans, which kvcompress calibrate --span model writes"
            )
        names = [name for name in names if name != SPAN]
    settings = [(name, rate) for name in names for rate in rates if supports(name, rate)]
    if not settings:
        raise InputError(f"none of {', '.join(names)} can do any of --bits {bits}")
    lm = load_model(model)
    places = [
        _places(lm.chunks(content, prefix + scored + 1), sequences, text)
        for content, text in zip(contents, texts, strict=True)
    ]
    rows = [
        Row(name, rate, compressors(name, rate, known, joint, sinks=sinks, window=window))
        for name, rate in progress(settings, len(settings), "training")
    ]
    reports, total = [], len(texts) * sequences * len(rows)
    tallies = [[Tally() for _ in rows] for _ in texts]
    steps = (
        step
        for chunks, tally in zip(places, tallies, strict=True)
        for step in score(lm, chunks, prefix, rows, tally)
    )
    for _ in progress(steps, total, "evaluating"):
        pass
    for text, tally in zip(texts, tallies, strict=True):
        results = [result(*pair) for pair in zip(rows, tally, strict=True)]
        original = math.exp(float(np.mean([s.original_nll for s in tally[0].scores])))
        reports.append(Report(text.name, original, results))
    title = f"{Path(model).name}: {sequences} x {scored} tokens after {prefix}"
    if plot:
        plot_curves(reports, plot, title)
    if as_json:
        facts = {
            "kvcompress": kvcompress.__version__,
            "model": Path(model).name,
            "calibration": known.fingerprint if known else None,
            "spans": joint.fingerprint if joint else None,
            "prefix": prefix,
            "scored": scored,
            "sequences": sequences,
            "sinks": sinks,
            "window": window,
            "dtype": lm.cache_dtype,
            "texts": [asdict(report) for report in reports],
        }
        print_json(facts)
        return
    for report in reports:
        perplexity = f"{report.text}, perplexity {report.perplexity:.2f}"
        caption = "\n".join([CAPTION, *_codes(rows, report.results, lm.nbytes)])
        stdout().print(_table(report.results, f"{title}\n{perplexity}", caption))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


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


def _codes(rows: Sequence[Row], results: Sequence[Result], model: int) -> list[str]:
    """What the codes of spans weigh against a model of so many bytes."""
    lines = []
    for row, found in zip(rows, results, strict=True):
        method = row.compressor(0).method
        if isinstance(method, CrossLayerTransform):
            size = sum(code.nbytes for code in method.groups)
            values = sum(code.group.num_values for code in method.groups)
            line = CODES.format(
                bits=row.bits,
                size=size / 1e6,
                share=100 * size / model,
                model=model / 1e6,
                tokens=8 * size / (values * (16 - found.coded_bits_per_value)),
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
