"""The picture of `kvcompress compare`: error against bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.cli.figure import save_figure, style
from kvcompress.methods import known_methods

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvcompress.cli.comparison import Result

PANELS = {
    "key_relative_mse": "keys: rel-MSE",
    "value_relative_mse": "values: rel-MSE",
    "attention_relative_error": "attention output: relative error",
}


def plot_results(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw every result as a point, and through the best of each method a line.

    Parameters
    ----------
    results : sequence of Result
    path : Path
        Its suffix chooses the format.
    title : str
    """
    from matplotlib.figure import Figure

    panels = [name for name in PANELS if getattr(results[0], name) is not None]
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for name, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        _panel(axes, results, name)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    save_figure(figure, path)


def _panel(axes: Axes, results: Sequence[Result], error: str) -> None:
    for number, name in enumerate(known_methods()):
        points = sorted(
            (r.bits_per_value, getattr(r, error)) for r in results if r.method.identifier == name
        )
        if not points:
            continue
        look = style(number)
        bits, errors = zip(*_front(points), strict=True)
        axes.plot(bits, errors, **look, markersize=6, label=name)
        bits, errors = zip(*points, strict=True)
        axes.scatter(bits, errors, color=look["color"], marker=look["marker"], s=16, alpha=0.4)
    axes.set_yscale("log")
    axes.set_title(PANELS[error], fontsize=10)
    axes.set_xlabel("bits per value, everything counted")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points, sorted by bits, that no point of fewer bits reaches the error of."""
    front: list[tuple[float, float]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
