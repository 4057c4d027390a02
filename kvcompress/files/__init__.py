"""Files of arrays and facts: one writer, and one reader that checks all it reads before use."""

from kvcompress.files.container import (
    flatten,
    format_of,
    load_arrays,
    reading,
    save_arrays,
    unflatten,
)
from kvcompress.files.facts import Facts
from kvcompress.files.rules import ArrayRule, check_arrays, check_mapping, require

__all__ = [
    "ArrayRule",
    "Facts",
    "check_arrays",
    "check_mapping",
    "flatten",
    "format_of",
    "load_arrays",
    "reading",
    "require",
    "save_arrays",
    "unflatten",
]
