"""The picture of `kvcompress evaluate`: KL divergence against bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.cli.console import InputError
from kvcompress.cli.rates import NAMES

if TYPE_CHECKING:
    from kvcompress.cli.evaluate import Result

STYLES = dict(zip(NAMES, (("#CC79A7", "D"), ("#E69F00", "v"), ("#0072B2", "o")), strict=True))
"""Colour, of the Okabe-Ito palette, and marker."""


def plot_curve(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw a line for every method.

    Parameters
    ----------
    results : sequence of Result
        Those of a method together.
    path : Path
        Its suffix chooses the format.
    title : str
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for method, group in groupby(results, lambda result: result.method):
        points = sorted((r.coded_bits_per_value, r.kl_mean) for r in group)
        color, marker = STYLES[method]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=method)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("coded bits per value")
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {path}: {error.strerror or error}") from error
