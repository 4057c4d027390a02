"""What the files of spans have in common: safetensors whose metadata describe the span."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

import numpy as np

from kvcompress import rope_scaling
from kvcompress.errors import CalibrationError
from kvcompress.layer_statistics import HostArray
from kvcompress.rope import RoPE
from kvcompress.rope_scaling import RopeScaling
from kvcompress.spans.span import Span, SpanLayer


def span_to_dict(span: Span) -> dict[str, Any]:
    """Return a span as values that JSON can carry."""
    return {"layers": list(span.layers), "shapes": [_layer_to_dict(s) for s in span.shapes]}


def span_from_dict(values: Mapping[str, Any]) -> Span:
    """Undo `span_to_dict`; what does not fit raises whatever Python raises."""
    shapes = tuple(_layer_from_dict(shape) for shape in values["shapes"])
    return Span(tuple(values["layers"]), shapes)


def save_arrays(
    arrays: Mapping[str, HostArray], path: str | PathLike[str], form: str, facts: Mapping[str, Any]
) -> None:
    """Write a safetensors file of a format, with what JSON can hold beside the arrays."""
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    save_file(contiguous, path, {"format": form, "facts": json.dumps(facts)})


def load_arrays(
    path: str | PathLike[str], form: str
) -> tuple[dict[str, HostArray], dict[str, Any]]:
    """Undo `save_arrays`: arrays and facts.

    Raises
    ------
    CalibrationError
        If it is no file of that format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise CalibrationError(
                    f"{path} has format {metadata.get('format')!r}, expected {form!r}"
                )
            names = list(file.keys())
            facts = json.loads(metadata.get("facts", "null"))
            return {name: file.get_tensor(name) for name in names}, facts
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CalibrationError(f"{path} is damaged, or no safetensors file: {error}") from error


def _layer_to_dict(shape: SpanLayer) -> dict[str, Any]:
    values = asdict(shape)
    scaling = shape.rope.scaling if shape.rope else None
    if scaling is not None:
        values["rope"]["scaling"]["kind"] = type(scaling).__name__
    return values


def _layer_from_dict(values: Mapping[str, Any]) -> SpanLayer:
    rope = values["rope"]
    if rope is not None and rope["scaling"] is not None:
        rope = {**rope, "scaling": _scaling(rope["scaling"])}
    return SpanLayer(**{**values, "rope": None if rope is None else RoPE(**rope)})


def _scaling(values: Mapping[str, Any]) -> RopeScaling:
    kind = getattr(rope_scaling, values["kind"])
    if not (isinstance(kind, type) and issubclass(kind, RopeScaling)):
        raise CalibrationError(f"{values['kind']!r} is no scaling of RoPE")
    # JSON has no tuples.
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    del settings["kind"]
    return kind(**settings)
