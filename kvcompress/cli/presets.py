"""The methods the command runs, each at a few settings that fit the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields

from kvcompress.methods import Method, known_methods


def presets(head_dims: Iterable[int]) -> dict[str, tuple[Method, ...]]:
    """Return the presets of every method that has some, for tensors of all these widths."""
    dims = set(head_dims)
    found = {name: cls.presets(dims) for name, cls in known_methods().items()}
    return {name: settings for name, settings in found.items() if settings}


def settings(method: Method) -> str:
    """Settings of a method that are not its defaults, as its constructor takes them."""
    values = asdict(method)
    changed = (f.name for f in fields(method) if values[f.name] != f.default)
    return ", ".join(f"{name}={values[name]!r}" for name in changed)
