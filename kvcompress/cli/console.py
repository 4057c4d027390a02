"""What the command says, and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

T = TypeVar("T")


class InputError(click.ClickException):
    """The user gave something that cannot be used: one line on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def stdout() -> Console:
    """Return the console for results: as wide as the terminal; wide enough where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def results_table(
    groups: Iterable[tuple[str, Iterable[Sequence[str]]]],
    *,
    headings: Sequence[str],
    title: str,
    caption: str,
) -> Table:
    """Table of groups of rows, each under its name.

    Parameters
    ----------
    groups : pairs of a name and rows
        A row: its label, then one cell for each of the other columns.
    headings : sequence of str
    title, caption : str
    """
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    first, *others = headings
    table.add_column(first, overflow="fold", vertical="bottom")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rows in groups:
        table.add_row(name)
        for label, *cells in rows:
            table.add_row(f"  {label}", *cells)
        table.add_section()
    return table


def print_json(facts: dict[str, Any]) -> None:
    """Print results for programs; what JSON has no word for is null."""
    click.echo(json.dumps(_finite(facts), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress(items: Iterable[T], total: int | None, description: str) -> Iterator[T]:
    """Pass the items on, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    with Progress(console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)
