"""Keys, values and queries from a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.arrays import FLOATING, HostArray, dtype_name, dtype_of, namespace_of
from kvcompress.cli.console import InputError

SAMPLE = "data/sample.safetensors"

_NAME = re.compile(r"(?:layers\.(?P<before>\d+)\.)?(?P<role>[kvq])(?:\.(?P<after>\d+))?")
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_ACCEPTED = f"{', '.join(FLOATING[:-1])} or {FLOATING[-1]}"


@dataclass(frozen=True)
class Layer:
    """Keys and values of one layer and, where there are any, queries of its last tokens.

    Attributes
    ----------
    k, v : arrays ``[(batch,) num_kv_heads, seq_len, head_dim]``
    q : array ``[(batch,) num_heads, num_queries, head_dim]`` or None
    """

    k: HostArray
    v: HostArray
    q: HostArray | None


def sample() -> list[Layer]:
    """Layers of the sample that comes with the package."""
    content = (files("kvcompress") / SAMPLE).read_bytes()
    return _layers(_parse_safetensors(content))


def load(path: Path) -> list[Layer]:
    """Layers in a ``.npz`` or ``.safetensors`` file, in order.

    Arrays are called ``k``, ``v`` and ``q``, or for several layers ``layers.{i}.k`` or ``k.{i}``;
    others are ignored.

    Raises
    ------
    InputError
        If the file cannot be read, or does not hold what is needed.
    """
    parsers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in parsers:
        raise InputError(f"{path}: expected a file {' or '.join(parsers)}, got {path.suffix!r}")
    try:
        layers = _layers(parsers[path.suffix](path))
    except InputError as error:
        raise InputError(f"{path}: {error.message}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # parsers raise many kinds of errors on a corrupt file
        raise InputError(f"{path}: not a readable {path.suffix} file: {error}") from error
    return layers


def _read_npz(path: Path) -> Mapping[str, HostArray]:
    with path.open("rb") as file:  # numpy.load leaves it open where it fails
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise InputError("this is one array (.npy); save k and v with numpy.savez")
        return {name: content[name] for name in content.files if _NAME.fullmatch(name)}


def _read_safetensors(path: Path) -> Mapping[str, HostArray]:
    return _parse_safetensors(path.read_bytes())


def _parse_safetensors(content: bytes) -> Mapping[str, HostArray]:
    # Its NumPy front end does not know bfloat16.
    import safetensors

    deserialize: Callable[[bytes], Any] = safetensors.deserialize
    arrays = {}
    for name, tensor in deserialize(content):
        if not _NAME.fullmatch(name):
            continue
        if tensor["dtype"] not in _SAFETENSORS_DTYPES:
            raise InputError(f"{name} must be {_ACCEPTED}, got {tensor['dtype']}")
        dtype = dtype_of(namespace_of(np), _SAFETENSORS_DTYPES[tensor["dtype"]])
        arrays[name] = np.frombuffer(tensor["data"], dtype=dtype).reshape(tensor["shape"])
    return arrays


def _layers(arrays: Mapping[str, HostArray]) -> list[Layer]:
    layers: dict[int, dict[str, HostArray]] = {}
    for name, x in arrays.items():
        _check(name, x)
        match = _NAME.fullmatch(name)
        before, role, after = match.group("before", "role", "after") if match else ("", "", "")
        layer = layers.setdefault(int(before or after or 0), {})
        if role in layer or (before and after):
            raise InputError(f"{name} is ambiguous; name arrays k or layers.0.k or k.0, one way")
        layer[role] = x
    if not layers:
        raise InputError("holds no arrays k and v, nor layers.0.k and layers.0.v, nor k.0 and v.0")
    for index, layer in layers.items():
        for role in ("k", "v"):
            if role not in layer:
                found = ", ".join(sorted(layer))
                raise InputError(f"layer {index} has no array {role} (only {found})")
    return [Layer(x["k"], x["v"], x.get("q")) for _, x in sorted(layers.items())]


def _check(name: str, x: HostArray) -> None:
    if dtype_name(x.dtype) not in FLOATING:
        raise InputError(f"{name} must be {_ACCEPTED}, got {x.dtype}; convert it first")
    if x.ndim not in (3, 4):
        raise InputError(f"{name} must be [heads, seq, dim] or [batch, ...], got shape {x.shape}")
    if x.size == 0:
        raise InputError(f"{name} is empty: shape {x.shape}")
    if not np.all(np.isfinite(x)):
        raise InputError(f"{name} holds NaN or infinities")
