"""Every error kvcompress raises; each is also the builtin a Python user would expect."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from numbers import Real
from typing import Any

import numpy as np


class KVCompressError(Exception):
    """Base of every error raised on purpose by kvcompress."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote our sentences.
        return str(self.args[0]) if self.args else ""


class ShapeError(KVCompressError, ValueError):
    """An array has the wrong number of dimensions, or sizes that do not fit together."""


class DTypeError(KVCompressError, TypeError):
    """An array has a dtype that is not float16, bfloat16 or float32, or two dtypes differ."""


class NamespaceError(KVCompressError, TypeError):
    """An argument is not an array of a known library, or two libraries were mixed."""


class NonFiniteError(KVCompressError, ValueError):
    """An array holds NaN, an infinity, or a magnitude no codec can carry."""


class SettingError(KVCompressError, ValueError):
    """A setting (rank, codebook size, bits, ...) is out of range or does not fit the data."""


class LayoutError(KVCompressError, ValueError):
    """A call does not fit what is there: a `CompressedKV` of another layout, or a layer of a cache.

    A layer of a cache of latents projects either hidden states, or keys and values.
    """


class CalibrationError(KVCompressError, ValueError):
    """A calibration is missing, too small, or not the one needed.

    Also: a file is of another format, or damaged, or statistics cannot be trained on.
    """


class FileError(KVCompressError, OSError):
    """A file cannot be read or written: it is missing, not permitted, or the disk is full.

    A file that can be read but holds something else raises `CalibrationError`.
    """

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class CodingError(KVCompressError, ValueError):
    """An entropy-coded payload is damaged and cannot be decoded."""


class PayloadError(KVCompressError, ValueError):
    """What is to be decompressed does not hold the arrays that it claims to hold."""


class UnsupportedModel(KVCompressError, TypeError):
    """A model's cache or attention is of a kind that cannot be read or replaced."""


class BackendError(KVCompressError, RuntimeError):
    """A backend asked for by name is unknown, unavailable, or failed to load."""


class BackendWarning(UserWarning):
    """A backend failed to load in automatic mode; the generic operations are used instead."""


class MethodWarning(UserWarning):
    """A method of an entry point failed to load; it is left out."""


class UnknownSequence(KVCompressError, KeyError):
    """A cache was asked for a sequence it does not hold (never allocated, or freed)."""


class UnknownLayer(KVCompressError, IndexError):
    """A cache was asked for a layer it does not have."""


class SlotError(KVCompressError, IndexError):
    """A slot is not in the pool of a paged cache."""


class SequenceExists(KVCompressError, ValueError):
    """A sequence was allocated under an identifier that is in use."""


class OutOfBlocks(KVCompressError, MemoryError):
    """A paged cache has too few free blocks; the operation changed nothing."""


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` as an int; raise `SettingError` unless it is an integer from `low` to `high`.

    Integers of NumPy count, booleans and floats do not.
    """
    accepted = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
    number = _number(value)
    if not isinstance(number, int):
        raise SettingError(f"{name} must be {accepted}, got {value!r}")
    if number < low or (high is not None and number > high):
        raise SettingError(f"{name} must be {accepted}, got {number}")
    return number


def check_fraction(name: str, value: Any, *, low_open: bool = False) -> float:
    """Return `value` as a Python number from 0 to 1 (0 itself only if allowed), or raise."""
    number = _number(value)
    if number is None or not 0 <= number <= 1 or (low_open and number == 0):
        raise SettingError(f"{name} must be in {'(' if low_open else '['}0, 1], got {value!r}")
    return number


def check_number(name: str, value: Any, low: float, high: float | None = None) -> float:
    """Return `value` as a Python number, finite and from `low` to `high`, or raise."""
    accepted = f"a number from {low} to {high}" if high is not None else f"a finite number >= {low}"
    number = _number(value)
    if number is None or not low <= number < math.inf or (high is not None and number > high):
        raise SettingError(f"{name} must be {accepted}, got {value!r}")
    return number


def check_positive(name: str, value: Any) -> float:
    """Return `value` as a Python number above 0 and finite, or raise `SettingError`."""
    number = _number(value)
    if number is None or not 0 < number < math.inf:
        raise SettingError(f"{name} must be a positive finite number, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: Collection[int], accepted: str) -> int:
    """Return `value` as an int; raise `SettingError` unless it is one of the integers `choices`."""
    number = _number(value)
    if not isinstance(number, int) or number not in choices:
        raise SettingError(f"{name} must be {accepted}, got {value!r}")
    return number


def normalize(settings: Any, **plain: Any) -> None:
    """Replace fields of a frozen dataclass, in its ``__post_init__``, by what they stand for.

    Numbers of NumPy would print, and JSON would refuse them, in settings that are otherwise equal.
    """
    for name, value in plain.items():
        object.__setattr__(settings, name, value)


def _number(value: Any) -> int | float | None:
    """Python's number for one of Python or NumPy; None for booleans and all that is no number."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return float(value) if isinstance(value, Real) else None
