"""Every error kvcompress raises; each is also the builtin a Python user would expect."""

from typing import Any


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
    """A calibration is missing, too small, or not the one needed, or a file is damaged."""


class CodingError(KVCompressError, ValueError):
    """An entropy-coded payload is damaged and cannot be decoded."""


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


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise `SettingError` unless `value` is an integer from `low` to `high`."""
    accepted = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingError(f"{name} must be {accepted}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise SettingError(f"{name} must be {accepted}, got {value}")


def check_fraction(name: str, value: Any, *, low_open: bool = False) -> None:
    """Raise `SettingError` unless `value` is a number from 0 to 1 (0 itself only if allowed)."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if not ok or (low_open and value == 0):
        raise SettingError(f"{name} must be in {'(' if low_open else '['}0, 1], got {value!r}")
