"""What files of calibrations and plans hold: rules for the arrays of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
"""Codes stand for less than this; norms, by which that is multiplied, saturate."""


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
    usual, low, high = arrays["key_norms"].T
    require(
        bool(np.all((low <= usual) & (usual <= high))),
        f"array {where}key_norms must have a usual norm between the least and the largest",
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
        matrices = (arrays[f"{role}.{name}"] for name in ("backward", "offset"))
        largest = reach([arrays[name] for name in names], *matrices)
        require(
            largest < _LARGEST,
            f"arrays {where}{role} restore numbers up to {largest:.3g}, more than {_LARGEST:.3g}",
        )


def reach(books: Sequence[HostArray], backward: HostArray, offset: HostArray) -> float:
    """Return the largest magnitude that codes can stand for, as a bound."""
    peaks = np.concatenate([np.max(np.abs(book), axis=1) for book in books], axis=1)
    rows = np.max(np.abs(backward), axis=2)
    sums = np.sum(peaks.astype(np.float64) * rows, axis=1)
    return float(np.max(sums, initial=0.0)) + float(np.max(np.abs(offset), initial=0.0))
