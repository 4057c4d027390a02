"""What files of calibrations and plans hold: rules for the arrays of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from kvcompress.arrays import FLOAT16_MAX, HostArray
from kvcompress.files import ArrayRule, check_arrays, require

TOKENS = 2.0**53
"""Most tokens: the most that float64 counts."""

_SUM = 2.0**180
"""Largest sum: of 2**53 keys, of which the largest is 2**127."""

_UNIT = 1.001
"""Largest number of a vector of norm 1, as rounded to float16."""

SUMS: Mapping[str, ArrayRule] = {
    "key_rows": ArrayRule(
        ("heads", "rows", "key_dim"), "float16", low=-FLOAT16_MAX, high=FLOAT16_MAX
    ),
    "value_rows": ArrayRule(("heads", "rows", "value_dim"), "float16", low=-_UNIT, high=_UNIT),
    "tags": ArrayRule(("rows",), "float64", low=0, high=1),
    "tokens": ArrayRule((), "float64", low=0, high=TOKENS, whole=True),
    "nonzero": ArrayRule(("heads",), "float64", low=0, high=TOKENS, whole=True),
    "queries": ArrayRule((), "float64", low=0, high=TOKENS, whole=True),
    "key_sum": ArrayRule(("heads", "key_dim"), "float64", low=-_SUM, high=_SUM),
    "key_moment": ArrayRule(
        ("heads*key_dim", "heads*key_dim"), "float64", high=_SUM**2, moments=True
    ),
    "value_sum": ArrayRule(("heads", "value_dim"), "float64"),
    "value_moment": ArrayRule(
        ("heads*value_dim", "heads*value_dim"), "float64", high=TOKENS, moments=True
    ),
    "log_norm_sum": ArrayRule(("heads",), "float64"),
    "query_moment": ArrayRule(
        ("heads", "key_dim", "key_dim"), "float64", high=_SUM**2, moments=True
    ),
}
"""Arrays of a layer of a `Calibration`."""

_LARGEST = 2.0**127
"""Largest number that is to be restored."""

_OCTAVES = 6
"""By how many octaves a norm of a value exceeds that which is usual, with room to spare."""

_OVERSHOOT = 2.0**60
"""Largest ratio of a key to what was coded: one of 2**60 is still restored as a finite one."""


def check_sums(arrays: Mapping[str, HostArray], rows: int, where: str) -> None:
    """Check the arrays of a layer of a calibration that keeps `rows` tokens.

    Raises
    ------
    CalibrationError
    """
    sizes = check_arrays(arrays, SUMS, {}, where)
    tokens, nonzero = float(arrays["tokens"]), arrays["nonzero"]
    for name in ("heads", "key_dim", "value_dim"):
        require(sizes[name] > 0, f"{where}{name} must be at least 1, got 0")
    wanted = int(min(tokens, rows))
    require(
        sizes["rows"] == wanted,
        f"array {where}key_rows must have {wanted} rows, of {tokens:.0f} tokens, "
        f"got {sizes['rows']}",
    )
    require(
        bool(np.all(nonzero <= tokens)), f"array {where}nonzero exceeds the {tokens:.0f} tokens"
    )
    limit = nonzero * 128.0
    require(
        bool(np.all(np.abs(arrays["log_norm_sum"]) <= limit)),
        f"array {where}log_norm_sum must be of norms from 2**-128 to 2**128",
    )
    _check_spread(
        f"{where}key", arrays["key_sum"], arrays["key_moment"], np.full_like(nonzero, tokens)
    )
    _check_spread(f"{where}value", arrays["value_sum"], arrays["value_moment"], nonzero)
    moment = arrays["query_moment"]
    if not arrays["queries"]:
        require(not np.any(moment), f"array {where}query_moment must be zero without queries")
    mean = np.trace(moment, axis1=1, axis2=2) / sizes["key_dim"]
    scaled = moment / np.where(mean > 0, mean, 1.0)[:, None, None]
    require(
        bool(np.all(np.linalg.eigvalsh(scaled) > -1e-4)),
        f"array {where}query_moment must have no negative eigenvalue",
    )


def _check_spread(name: str, total: HostArray, moment: HostArray, count: HostArray) -> None:
    """Check that means of squares are at least the squares of means."""
    squares = np.diagonal(moment).reshape(total.shape) * count[:, None]
    require(
        bool(np.all(total * total <= squares * 1.0001)),
        f"array {name}_sum exceeds what {name}_moment allows",
    )


def check_parameters(arrays: Mapping[str, HostArray], where: str = "") -> None:
    """Check the arrays of a `LayerParameters`, and that what they restore is finite.

    Raises
    ------
    CalibrationError
    """
    rules = {
        "log_norm": ArrayRule(("heads",), "float32", low=-140, high=140),
        "key_norms": ArrayRule(("heads", 3), "float32", low=-140, high=140),
    }
    books: dict[str, list[str]] = {}
    for role in ("keys", "values"):
        lead = f"{role}.codebooks."
        count = sum(name.startswith(lead) for name in arrays)
        books[role] = [f"{lead}{i}" for i in range(count)]
        rules |= {
            f"{role}.forward": ArrayRule(("units", f"{role}_dim", f"{role}_components"), "float32"),
            f"{role}.backward": ArrayRule(
                ("units", f"{role}_components", f"{role}_dim"), "float32"
            ),
            f"{role}.offset": ArrayRule(("units", 1, f"{role}_dim"), "float32"),
            **{name: ArrayRule(("units", 256, f"{name}_dim"), "float32") for name in books[role]},
        }
    sizes = check_arrays(arrays, rules, {}, where)
    units, heads = sizes["units"], sizes["heads"]
    require(
        0 < units <= heads and heads % units == 0,
        f"array {where}log_norm must be of a multiple of the {units} units of the bases, "
        f"got {heads} heads",
    )
    for role, names in books.items():
        dims = [sizes[f"{name}_dim"] for name in names]
        components, dim = sizes[f"{role}_components"], sizes[f"{role}_dim"]
        require(
            bool(dims) and 0 not in dims and sum(dims) == components,
            f"codebooks {where}{role} must be for {components} components, got {dims}",
        )
        require(
            dim > 0 and dim % (heads // units) == 0,
            f"basis {where}{role} must be of {heads // units} heads each, got {dim} channels",
        )
        largest = _reach([arrays[name] for name in names], arrays, role)
        if role == "keys":
            _check_norms(arrays["key_norms"], largest, where)
        else:
            largest *= 2.0 ** (max(0.0, float(arrays["log_norm"].max())) + _OCTAVES)
        require(
            largest < _LARGEST,
            f"arrays {where}{role} restore numbers up to {largest:.3g}, more than {_LARGEST:.3g}",
        )


def _check_norms(norms: HostArray, largest: float, where: str) -> None:
    """Check norms of keys, of which those decoded are `largest` at most, and then multiplied."""
    usual, low, high = norms.T
    require(
        bool(np.all((low <= usual) & (usual <= high))),
        f"array {where}key_norms must have a usual norm between the least and the largest",
    )
    most = largest * 2.0 ** -float(np.min(usual, initial=0.0))
    require(
        most <= _OVERSHOOT,
        f"arrays {where}keys restore {most:.3g} times the norm of a key, more than {_OVERSHOOT:g}",
    )


def _reach(books: list[HostArray], arrays: Mapping[str, HostArray], role: str) -> float:
    """Return the largest magnitude that the codes of a role can stand for, as a bound."""
    peaks = np.concatenate([np.max(np.abs(book), axis=1) for book in books], axis=1)
    rows = np.max(np.abs(arrays[f"{role}.backward"]), axis=2)
    sums = np.sum(peaks.astype(np.float64) * rows, axis=1)
    offset = np.max(np.abs(arrays[f"{role}.offset"]), initial=0.0)
    return float(np.max(sums, initial=0.0) + offset) if math.isfinite(offset) else math.inf
