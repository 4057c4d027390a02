"""``kvcompress compare``: every method at a few settings, on the same keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click
from rich.table import Table

import kvcompress
from kvcompress.arrays import dtype_name
from kvcompress.cli.comparison import Result, measured
from kvcompress.cli.console import print_json, progress, results_table, stdout
from kvcompress.cli.figure import check_plot
from kvcompress.cli.files import Layer, load, sample
from kvcompress.cli.libraries import LIBRARIES, library_option
from kvcompress.cli.options import chosen, json_option, methods_option, plot_option
from kvcompress.cli.plot import plot_results
from kvcompress.cli.presets import presets, settings
from kvcompress.compressor.compressor import KVCacheCompressor

HEADINGS = (
    "method",
    "bits/\nvalue",
    "ratio",
    "keys\nrel-MSE",
    "values\nrel-MSE",
    "attn.\nerror",
    "encode\nMB/s",
    "decode\nMB/s",
)
CAPTION = """\
bits/value: all bytes needed to decode; bases, codebooks, exact tokens included.
rel-MSE: |x - x'|^2 / |x|^2. Attention error: |o - o'| / |o| of the output of
causal attention for the queries given. Both are means over the layers.
MB/s: megabytes of the original keys and values per second."""


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@methods_option(presets([64]))
@library_option
@click.option("--sinks", type=click.IntRange(0), default=0, help="First tokens kept exact.")
@click.option("--window", type=click.IntRange(0), default=0, help="Last tokens kept exact.")
@json_option
@plot_option("Draw error against bits (.png, .svg, .pdf).")
def compare(
    file: Path | None,
    methods: str | None,
    library: str,
    sinks: int,
    window: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Compare the methods on keys and values, at a few settings each.

    Without FILE, on the sample that comes with the package: 768 tokens of SmolLM2-135M-Instruct,
    three of its layers. FILE is a .npz or .safetensors file of float16, bfloat16 or float32:

    \b
      k, v   [num_kv_heads, seq_len, head_dim], or with a batch in front
      q      [num_heads, num_queries, head_dim], optional: queries of the last
             tokens, rotated (RoPE) like the keys; heads grouped as in GQA

    For several layers call them layers.0.k or k.0, and so on.

    \b
    Examples:
      kvcompress compare
      kvcompress compare cache.safetensors --plot compare.png
      kvcompress compare cache.npz --methods Hybrid --sinks 4 --window 128
      kvcompress compare --library jax --json > compare.json
    """  # noqa: D301 (click keeps the lines after \b)
    if plot:
        check_plot(plot)
    layers = load(file) if file else sample()
    run = LIBRARIES[library]()
    found = presets(x.shape[-1] for layer in layers for x in (layer.k, layer.v))
    compressors = [
        (method, KVCacheCompressor(method, sinks=sinks, window=window))
        for name in chosen(methods, found)
        for method in found[name]
    ]
    results = list(progress(measured(compressors, layers, run), len(compressors), "comparing"))
    source = file.name if file else "sample"
    if plot:
        plot_results(results, plot, f"{source}: {_shapes(layers)}, {library}")
    if as_json:
        facts = {
            "kvcompress": kvcompress.__version__,
            "source": source,
            "layers": len(layers),
            "key_shape": layers[0].k.shape,
            "value_shape": layers[0].v.shape,
            "dtype": str(layers[0].k.dtype),
            "library": library,
            "sinks": sinks,
            "window": window,
            "results": [{**asdict(x), "method": x.method.to_dict()} for x in results],
        }
        print_json(facts)
    else:
        stdout().print(_table(results, f"{source}: {_shapes(layers)}, {library}"))


def _shapes(layers: Sequence[Layer]) -> str:
    k, v = layers[0].k, layers[0].v
    shapes = f"k and v {list(k.shape)}" if k.shape == v.shape else f"k {k.shape}, v {v.shape}"
    return f"{len(layers)} layer{'s' * (len(layers) > 1)}, {shapes} {dtype_name(k.dtype)}"


def _table(results: Sequence[Result], title: str) -> Table:
    by_method = groupby(results, lambda result: result.method.identifier)
    return results_table(
        ((name, [_row(result) for result in group]) for name, group in by_method),
        headings=HEADINGS,
        title=title,
        caption=CAPTION,
    )


def _row(result: Result) -> list[str]:
    error = result.attention_relative_error
    return [
        settings(result.method),
        f"{result.bits_per_value:.2f}",
        f"{result.ratio:.2f}",
        f"{result.key_relative_mse:.2g}",
        f"{result.value_relative_mse:.2g}",
        "-" if error is None else f"{error:.2g}",
        f"{result.compress_mb_per_s:.1f}",
        f"{result.decompress_mb_per_s:.1f}",
    ]
