"""Pictures that ``--plot`` asks for: whether one can be drawn, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.cli.console import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
