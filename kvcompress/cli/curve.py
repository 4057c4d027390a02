"""The picture of `kvcompress evaluate`: KL divergence against bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.cli.figure import save_figure, style
from kvcompress.evaluation.rates import names

if TYPE_CHECKING:
    from kvcompress.evaluation.scoring import Report


def plot_curves(reports: Sequence[Report], path: Path, title: str) -> None:
    """Draw a panel for every text, and in it a line for every method.

    Parameters
    ----------
    reports : sequence of Report
        Results of a method together.
    path : Path
        Its suffix chooses the format.
    title : str
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.2 * len(reports), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for report, axes in zip(reports, panels, strict=True):
        for method, group in groupby(report.results, lambda row: row.method):
            points = sorted((row.coded_bits_per_value, row.kl_mean) for row in group)
            look = style(names().index(method))
            axes.plot(*zip(*points, strict=True), **look, label=method)
        axes.set_yscale("log")
        axes.set_title(report.text, fontsize=10)
        axes.set_xlabel("coded bits per value")
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL divergence, nats per token")
    panels[0].legend(frameon=False)
    save_figure(figure, path)
