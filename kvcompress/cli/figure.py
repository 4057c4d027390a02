"""Pictures that ``--plot`` asks for: whether one can be drawn, its styles, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.cli.console import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
"""Of the Okabe-Ito palette, which the colour-blind can tell apart."""

MARKERS = "osD^vPX*<>ph8d"


def style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of the method with a number: all different for 98 of them."""
    line = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
    marker = MARKERS[number % len(MARKERS)]
    return {"color": COLORS[number % len(COLORS)], "marker": marker, "linestyle": line}


def check_plot(path: Path) -> None:
    """Raise `InputError` unless a picture can be written to `path`; before any work is done."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise InputError(
            "--plot needs matplotlib; install it with: python -m pip install 'kvcompress[cli]'"
        ) from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise InputError(f"--plot {path}: the suffix must be one of .{', .'.join(known)}")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: no such directory: {path.parent}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture; the suffix of `path` chooses the format."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {path}: {error.strerror or error}") from error
