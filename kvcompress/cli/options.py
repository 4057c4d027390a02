"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import click

from kvcompress.cli.console import InputError

Option: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def text_option(text: str) -> Option:
    """One text or several."""
    return click.option(
        "--text",
        "texts",
        type=click.Path(path_type=Path),
        multiple=True,
        required=True,
        help=text,
    )


def plot_option(text: str) -> Option:
    """A picture to draw; see `check_plot`."""
    return click.option("--plot", type=click.Path(path_type=Path), metavar="PNG", help=text)


def methods_option(names: Iterable[str]) -> Option:
    """Some of the methods; see `chosen`."""
    return click.option("--methods", metavar="A,B", help=f"Only these of {', '.join(names)}.")


def chosen(methods: str | None, names: Iterable[str]) -> list[str]:
    """Methods asked for, in any case, among `names`; all of them if none.

    Raises
    ------
    InputError
        If there is no such method.
    """
    if methods is None:
        return list(names)
    known = {name.lower(): name for name in names}
    asked = [name.strip() for name in methods.split(",")]
    for name in asked:
        if name.lower() not in known:
            raise InputError(f"unknown method {name!r}; known: {', '.join(names)}")
    return list(dict.fromkeys(known[name.lower()] for name in asked))
