"""Rotary embeddings as parts of calibrations: in fingerprints and in files."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.errors import CalibrationError
from kvcompress.files import Facts, require
from kvcompress.rope import RoPE


def rope_array(rope: RoPE | None) -> dict[str, HostArray]:
    """Return the settings of a RoPE as an array to be digested; nothing without a RoPE."""
    if rope is None:
        return {}
    settings = json.dumps(rope.to_dict(), sort_keys=True).encode()
    return {"rope": np.frombuffer(settings, dtype=np.uint8)}


def check_rope(layer: int, known: RoPE | None, rope: RoPE | None) -> None:
    """Check that what is added to the statistics of a layer has the same RoPE.

    Raises
    ------
    CalibrationError
    """
    if known != rope:
        raise CalibrationError(
            f"layer {layer} has statistics of keys with rope={known}, got rope={rope}"
        )


def ropes_to_dict(ropes: Mapping[int, RoPE]) -> dict[str, dict[str, object]]:
    """Return the RoPE of every layer as values that JSON can carry."""
    return {str(layer): rope.to_dict() for layer, rope in ropes.items()}


def read_rope(facts: Facts, name: str, head_dim: int) -> RoPE | None:
    """Read a RoPE of heads of `head_dim` channels, or None, from a file.

    Raises
    ------
    CalibrationError, SettingError
    """
    if facts.plain.get(name) is None:
        return None
    rope = RoPE.from_dict(facts.object(name).plain)
    require(
        rope.head_dim == head_dim,
        f"a RoPE is for head_dim {rope.head_dim}, but keys have {head_dim}",
    )
    rope.check_finite()
    return rope
