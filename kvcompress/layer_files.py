"""Files of arrays by layer: safetensors, named ``layer.name``, and JSON in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from kvcompress.errors import CalibrationError
from kvcompress.layer_statistics import HostArray


def save_layers(
    layers: Mapping[int, Mapping[str, HostArray]],
    path: str | PathLike[str],
    form: str,
    facts: Mapping[str, Any],
) -> None:
    """Write a file of a format, with what JSON can hold beside the arrays."""
    from safetensors.numpy import save_file

    arrays = {
        f"{layer}.{name}": np.asarray(x, order="C")
        for layer, named in layers.items()
        for name, x in named.items()
    }
    texts = {name: json.dumps(value) for name, value in facts.items()}
    save_file(arrays, path, {"format": form, **texts})


def load_layers(
    path: str | PathLike[str], form: str, *, kind: str
) -> tuple[dict[str, dict[str, HostArray]], dict[str, str]]:
    """Undo `save_layers`: arrays by layer, and the texts of the facts.

    Raises
    ------
    CalibrationError
        If it is no file of that format: no such `kind`.
    """
    from safetensors import SafetensorError, safe_open

    layers: dict[str, dict[str, HostArray]] = {}
    try:
        with safe_open(path, "numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != form:
                raise CalibrationError(
                    f"{path} is no {kind}: its format is {metadata.get('format')!r}, "
                    f"expected {form!r}"
                )
            names = list(file.keys())
            for name in names:
                layer, _, rest = name.partition(".")
                layers.setdefault(layer, {})[rest] = file.get_tensor(name)
    except CalibrationError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CalibrationError(f"{path} is no {kind}: {error}") from error
    return layers, metadata
