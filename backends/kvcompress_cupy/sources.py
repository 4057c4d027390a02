"""The kernels' source files and the templates that are instantiated from them."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

from kvcompress.ops.packing import CODE_BITS
from kvcompress_cupy import tables

KERNELS = Path(__file__).parent / "kernels"

GROUPS = (32, 64, 128, 0)
"""Values in a group; 0 stands for one group a row."""

DIMS = (32, 64, 128, 256)
"""Channels that a rotation may have."""

VECTOR_DIMS = (1, 2, 4, 8, 16, 32, 0)
"""Lengths that vectors are filled up to; 0 stands for those that are longer still."""

WORDS = {16: "uint4", 8: "unsigned long long", 4: "unsigned", 2: "unsigned short"}
"""Types by their bytes, to copy with."""

AXES = (0, 1)
"""Channel and token, what a group holds one of."""

CTYPES = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "float"}
"""Types of the kernels by dtype name."""

OPTIONS = ("-std=c++17", "-fmad=false")
"""How they are compiled: no contraction, which would change codes."""

_PARAMETERS: dict[str, tuple[tuple[object, ...], ...]] = {
    "quantize_token": (CODE_BITS, GROUPS, tuple(CTYPES.values())),
    "quantize_channel": (CODE_BITS, GROUPS, tuple(CTYPES.values())),
    "dequantize": (CODE_BITS, GROUPS, AXES, tuple(CTYPES.values())),
    "clip_token": (GROUPS, tuple(CTYPES.values())),
    "clip_channel": (GROUPS, tuple(CTYPES.values())),
    "quantize_rotated": (CODE_BITS, DIMS, tuple(CTYPES.values())),
    "dequantize_rotated": (CODE_BITS, DIMS, tuple(CTYPES.values())),
    "nearest": (VECTOR_DIMS,),
    "lookup": (tuple(WORDS.values()),),
    "encode_product": (VECTOR_DIMS,),
    "decode_product": ((4, 2, 1),),
    "quantize_allocated": ((4, 1),),
    "dequantize_allocated": ((4, 1),),
    "within": (tuple(CTYPES.values()),),
    "gather_slots": (tuple(WORDS.values()),),
    "scatter_slots": (tuple(WORDS.values()),),
}

_WRITTEN = {
    "tables.cuh": lambda: tables.header(CODE_BITS),
    "all_steps.cuh": tables.all_steps_header,
    "all_levels.cuh": tables.all_levels_header,
    "all_errors.cuh": tables.all_errors_header,
}

FAMILIES = tuple(_PARAMETERS)
"""Kernels, each a template in a file of its name."""


def names(family: str) -> tuple[str, ...]:
    """Name expressions of all instantiations of a kernel."""
    return tuple(name(family, *values) for values in itertools.product(*_PARAMETERS[family]))


def name(family: str, *parameters: object) -> str:
    """Name expression of one instantiation."""
    return f"{family}<{', '.join(map(str, parameters))}>"


@cache
def source(family: str) -> str:
    """Source of a kernel with its headers in place.

    One string, since CuPy's cache of compiled kernels knows a source by its text. The headers of
    constants are no files, but what `tables` writes.
    """
    included: set[str] = set()

    def expand(file: str) -> list[str]:
        lines = []
        for line in (KERNELS / file).read_text(encoding="utf-8").splitlines():
            if line.startswith("#include"):
                header = line.split('"')[1]
                if header in _WRITTEN:
                    lines.append(_WRITTEN[header]())
                    continue
                if header not in included:
                    included.add(header)
                    lines += expand(header)
            elif line != "#pragma once":
                lines.append(line)
        return lines

    return "\n".join(expand(f"{family}.cu")) + "\n"
