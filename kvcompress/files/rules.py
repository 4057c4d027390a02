"""What a format says of its arrays, as data, and the one check against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.errors import CalibrationError

Sizes: TypeAlias = dict[str, int]

_ROWS = 256
"""Rows of a matrix that are looked at together: copies of them are small."""

_SLACK = 0.01
"""By how much rounding may let a second moment exceed what others allow, relative to these."""


@dataclass(frozen=True)
class ArrayRule:
    """What an array must be.

    Parameters
    ----------
    shape : tuple of int and str
        A number; a name, which stands for the same number in all arrays of a group; or a product of
        names that are known, such as ``"heads*head_dim"``.
    dtype : str
    low, high : float
        Least and largest value. Without them, values only have to be finite.
    whole : bool
        Whether values are whole numbers.
    rising : bool
        Whether each value is at least the one before it.
    total : int, optional
        What the values along the last axis sum to.
    moments : bool
        Whether the last two axes are second moments: symmetric, with a diagonal that is not
        negative, and no value larger than the diagonal allows.
    """

    shape: tuple[int | str, ...]
    dtype: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    rising: bool = False
    total: int | None = None
    moments: bool = False


def require(condition: bool, message: str) -> None:
    """Raise `CalibrationError` unless a condition holds."""
    if not condition:
        raise CalibrationError(message)


def check_mapping(
    arrays: Mapping[str, HostArray], rules: Mapping[str, ArrayRule], sizes: Sizes, where: str = ""
) -> Sizes:
    """Check names, dtypes and shapes of arrays against the rules of a format.

    Parameters
    ----------
    arrays : mapping of str to array
    rules : mapping of str to ArrayRule
        For every array that there must be. Names of sizes are bound in this order.
    sizes : dict of str to int
        Sizes that are known.
    where : str
        What precedes the names of the arrays in the message of an error.

    Returns
    -------
    dict of str to int
        All sizes.

    Raises
    ------
    CalibrationError
    """
    for name in rules:
        require(name in arrays, f"array {where}{name} is missing")
    for name in arrays:
        require(name in rules, f"array {where}{name} is none of the format")
    known = dict(sizes)
    for name, rule in rules.items():
        x = arrays[name]
        require(
            x.dtype == np.dtype(rule.dtype),
            f"array {where}{name} must be {rule.dtype}, got {x.dtype}",
        )
        for size, expected in zip(x.shape, rule.shape, strict=False):
            if isinstance(expected, str) and "*" not in expected:
                known.setdefault(expected, size)
        wanted = tuple(_size(expected, known) for expected in rule.shape)
        if x.shape != wanted:
            told = ", ".join(map(str, rule.shape))
            raise CalibrationError(
                f"array {where}{name} must have shape [{told}] = {list(wanted)}, "
                f"got {list(x.shape)}"
            )
    return known


def check_arrays(
    arrays: Mapping[str, HostArray], rules: Mapping[str, ArrayRule], sizes: Sizes, where: str = ""
) -> Sizes:
    """Check arrays, values included, against the rules of a format; see `check_mapping`."""
    known = check_mapping(arrays, rules, sizes, where)
    for name, rule in rules.items():
        _check_values(f"array {where}{name}", arrays[name], rule)
    return known


def _size(expected: int | str, known: Mapping[str, int]) -> int:
    if isinstance(expected, int):
        return expected
    return math.prod(known.get(name, -1) for name in expected.split("*"))


def _check_values(name: str, x: HostArray, rule: ArrayRule) -> None:
    if not x.size:
        return
    least, most = float(x.min()), float(x.max())  # NaN if there is one
    if not (math.isfinite(least) and math.isfinite(most)):
        bad = np.unravel_index(int(np.argmin(np.isfinite(x))), x.shape)
        raise CalibrationError(
            f"{name} must be finite, got {x[bad]} at index {list(map(int, bad))}"
        )
    if least < rule.low or most > rule.high:
        raise CalibrationError(
            f"{name} must be from {rule.low:g} to {rule.high:g}, got {least:g} to {most:g}"
        )
    if rule.whole:
        require(bool(np.all(x == np.floor(x))), f"{name} must be whole numbers")
    if rule.rising:
        require(bool(np.all(x[..., 1:] >= x[..., :-1])), f"{name} must not fall")
    if rule.total is not None:
        sums = x.sum(axis=-1, dtype=np.int64)
        wrong = sums[sums != rule.total].ravel()
        require(not wrong.size, f"{name} must sum to {rule.total}, got {wrong[:1]}")
    if rule.moments:
        for matrix in x.reshape(-1, *x.shape[-2:]):
            _check_moments(name, matrix)


def _check_moments(name: str, x: HostArray) -> None:
    diagonal = np.diagonal(x).astype(np.float64)
    require(bool(np.all(diagonal >= 0)), f"{name} has {diagonal.min():g} on its diagonal")
    # Squares of the smallest numbers vanish, their products with others do not.
    root = np.sqrt(diagonal + float(np.finfo(x.dtype).tiny) * 2**20)
    for rows in _blocks(len(x)):
        block, limit = x[rows], root[rows, None] * root
        fits = np.abs(block) <= (1 + _SLACK) * limit
        fits &= np.abs(block - x[:, rows].T) <= _SLACK * limit
        if not fits.all():
            i, j = np.argwhere(~fits)[0]
            raise CalibrationError(
                f"{name} must be symmetric second moments, got {block[i, j]:g} and "
                f"{x[j, i + rows.start]:g} at index {[int(i) + rows.start, int(j)]}, "
                f"of {limit[i, j]:g} at most"
            )


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, start + _ROWS)
