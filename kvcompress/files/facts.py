"""JSON of files: parsed within limits, and read by name, type and range."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn, Self

from kvcompress.errors import CalibrationError

DEPTH = 32
"""Most levels of objects and arrays."""

DIGITS = 40
"""Most digits of an integer: 128 bits are a seed."""

CONTAINERS = 1 << 18
"""Most objects and arrays, of which each takes some hundred bytes."""

LAYERS = 1 << 16
"""Layers are numbered below this."""

# Possessive: what could be tried again would be kept, a hundred bytes a character.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """Return what JSON says.

    Raises
    ------
    CalibrationError
        If it is no JSON, or is nested too deeply, names a key twice, or holds too many objects, too
        long an integer, or a number that is not finite.
    """
    containers = text.count("[") + text.count("{")
    if containers > DEPTH:
        _check_nesting(text)
    try:
        return json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"this is no JSON: {error}") from error


def dump_json(value: Any) -> str:
    """Return JSON that `parse_json` accepts, or raise `CalibrationError`."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CalibrationError(f"JSON cannot hold this: {error}") from error
    parse_json(text)
    return text


def shown(value: Any) -> str:
    """Return what an error shows of a value."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def layer_number(name: str) -> int:
    """Return the number of a layer that a name stands for, or raise `CalibrationError`."""
    if not re.fullmatch("0|[1-9][0-9]{0,5}", name) or int(name) >= LAYERS:
        raise CalibrationError(f"layers are numbers from 0 to {LAYERS - 1}, got {shown(name)}")
    return int(name)


class Facts:
    """An object of JSON; reading from it raises `CalibrationError` at what it should not hold.

    Parameters
    ----------
    value : dict
    where : str
        What the object is, for the message of an error.
    names : str
        What it holds, all of it and nothing else. If left out, whatever it likes.
    """

    def __init__(self, value: Any, where: str, *names: str) -> None:
        if not isinstance(value, dict):
            raise CalibrationError(f"{where} must be an object, got {shown(value)}")
        if names and set(value) != set(names):
            raise CalibrationError(
                f"{where} must hold {', '.join(names)}, got {shown(', '.join(sorted(value)))}"
            )
        self.plain: dict[str, Any] = value
        self._where = where

    def object(self, name: str, *names: str) -> Self:
        """Return an object, which holds `names` and nothing else."""
        return type(self)(self.plain[name], f"{self._where}.{name}", *names)

    def objects(self, name: str, *names: str) -> list[Self]:
        """Return an array of objects."""
        values = enumerate(self._list(name))
        return [type(self)(x, f"{self._where}.{name}[{i}]", *names) for i, x in values]

    def items(self, *names: str) -> Iterator[tuple[str, Self]]:
        """Names and objects, where all that it holds are objects."""
        for name in self.plain:
            yield name, self.object(name, *names)

    def integer(self, name: str, low: int, high: int) -> int:
        """Return an integer from `low` to `high`."""
        value = self.plain[name]
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, f"an integer from {low} to {high}")
        return value

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """Return an array of integers from `low` to `high`."""
        values = self._list(name)
        if any(type(value) is not int or not low <= value <= high for value in values):
            self._refuse(name, f"integers from {low} to {high}")
        return values

    def number(self, name: str, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        value = self.plain[name]
        if type(value) not in (int, float) or not low <= value <= high:
            self._refuse(name, f"a number from {low:g} to {high:g}")
        number: float = value
        return number

    def choice(self, name: str, *choices: str) -> str:
        """Return one of some strings."""
        value = self.plain[name]
        if not isinstance(value, str) or value not in choices:
            self._refuse(name, f"one of {', '.join(choices)}")
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.plain[name]
        if not isinstance(value, list):
            self._refuse(name, "an array")
        return value

    def _refuse(self, name: str, accepted: str) -> NoReturn:
        raise CalibrationError(
            f"{self._where}.{name} must be {accepted}, got {shown(self.plain[name])}"
        )


def _check_nesting(text: str) -> None:
    depth = containers = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            depth, containers = depth + 1, containers + 1
            if depth > DEPTH:
                raise CalibrationError(f"JSON may be nested {DEPTH} levels deep, this is deeper")
            if containers > CONTAINERS:
                raise CalibrationError(f"JSON may hold {CONTAINERS} objects, this holds more")
        elif token in "]}":
            depth -= 1


def _integer(digits: str) -> int:
    if len(digits) > DIGITS + 1:
        raise CalibrationError(f"integers may have {DIGITS} digits, got {len(digits)}")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise CalibrationError(f"numbers must be finite, got {shown(digits)}")
    return number


def _constant(name: str) -> NoReturn:
    raise CalibrationError(f"numbers must be finite, got {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise CalibrationError(f"an object may have a key once, {shown(twice)} is there twice")
    return found
