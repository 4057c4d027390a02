"""The methods that are known here: those that were defined, and those of entry points."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from kvcompress.errors import MethodWarning, SettingError

ENTRY_POINTS = "kvcompress.methods"
"""Entry-point group under which other distributions register the classes of their methods."""

_known: dict[str, type[Any]] = {}


def register(cls: type[Any]) -> None:
    """Register a class under its identifier.

    A class may be defined again, as a notebook does; another class may not take its identifier.

    Raises
    ------
    SettingError
        If another class has this identifier.
    """
    other = _known.setdefault(cls.identifier, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise SettingError(
            f"the identifier {cls.identifier!r} of {cls.__qualname__} is that of "
            f"{other.__module__}.{other.__qualname__}"
        )
    _known[cls.identifier] = cls


def known(base: type[Any]) -> dict[str, type[Any]]:
    """Return the registered subclasses of `base` by identifier, in alphabetical order.

    Entry points are loaded when this is first called; one that fails is left out with a warning.
    """
    _load_entry_points()
    return {name: cls for name, cls in sorted(_known.items()) if issubclass(cls, base)}


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the method {point.name!r} failed to load and is left out: {error}",
                MethodWarning,
                stacklevel=4,
            )
