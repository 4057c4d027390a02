"""Files of arrays: safetensors, with a format and what JSON can hold in their metadata."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.errors import CalibrationError


def save_arrays(
    path: str | PathLike[str],
    arrays: Mapping[str, HostArray],
    *,
    form: str,
    facts: Mapping[str, Any],
) -> None:
    """Write a file, wholly or not at all: an older one of that name stays until it is complete.

    Parameters
    ----------
    path : path
    arrays : mapping of str to array
    form : str
        Name and version of the format.
    facts : mapping
        Whatever JSON can hold.
    """
    from safetensors.numpy import save_file

    target = Path(path)
    contiguous = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    descriptor, part = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(descriptor)
    try:
        save_file(contiguous, part, {"format": form, "facts": json.dumps(facts)})
        Path(part).replace(target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def load_arrays(
    path: str | PathLike[str], *, form: str, kind: str
) -> tuple[dict[str, HostArray], Any]:
    """Read a file that `save_arrays` wrote.

    Parameters
    ----------
    path : path
    form : str
        The format that is expected.
    kind : str
        What such a file holds, for the message of the error.

    Returns
    -------
    arrays : dict of str to array
    facts
        What JSON held.

    Raises
    ------
    CalibrationError
        If it is not a file of that format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise CalibrationError(
                    f"{path} is not {kind}: its format is {metadata.get('format')!r}, "
                    f"expected {form!r}"
                )
            facts = json.loads(metadata["facts"])
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, facts
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{path} is not {kind}, or damaged: {error}") from error


def format_of(path: str | PathLike[str]) -> str | None:
    """Return the format of a file that `save_arrays` wrote; None of any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return None


def flatten(groups: Mapping[Any, Mapping[str, HostArray]]) -> dict[str, HostArray]:
    """Name arrays in groups ``group.name``."""
    return {f"{group}.{name}": x for group, named in groups.items() for name, x in named.items()}


def unflatten(arrays: Mapping[str, HostArray]) -> dict[str, dict[str, HostArray]]:
    """Undo `flatten`; groups are strings."""
    groups: dict[str, dict[str, HostArray]] = {}
    for name, x in arrays.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = x
    return groups
