"""The methods the command runs, each at a few settings that fit the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields

from kvcompress.methods import (
    GroupQuantization,
    Hybrid,
    LowRank,
    Method,
    RotatedQuantization,
    TransformCoding,
    VectorQuantization,
)

METHODS = (
    LowRank,
    VectorQuantization,
    Hybrid,
    GroupQuantization,
    RotatedQuantization,
    TransformCoding,
)
NAMES = tuple(method.__name__ for method in METHODS)


def ladder(head_dims: Iterable[int]) -> Mapping[str, tuple[Method, ...]]:
    """Settings of every method, by name, that fit tensors of all these widths."""
    dims = set(head_dims)
    full, divisor = min(dims), math.gcd(*dims)
    half = max(1, full // 2)
    low_rank = (max(1, full // 4), half, max(1, 3 * full // 4))
    vector_quantization = ((8, 16), (8, 64), (4, 16), (4, 64), (2, 16), (4, 256), (2, 64))
    hybrid = ((half, 2), (half, 3), (half, 4), (full, 2), (full, 3), (full, 4), (full, 8))
    groups = ((2, 64), (2, 32), (3, 64), (4, 64), (8, 64))
    rungs: tuple[tuple[Method, ...], ...] = (
        tuple(LowRank(rank) for rank in low_rank),
        tuple(
            VectorQuantization(size, math.gcd(dim, divisor)) for dim, size in vector_quantization
        ),
        tuple(Hybrid(rank, bits) for rank, bits in hybrid),
        tuple(GroupQuantization(bits, size) for bits, size in groups),
        tuple(RotatedQuantization(bits) for bits in (1, 2, 3, 4, 5, 6, 8)),
        tuple(TransformCoding(bits) for bits in (1, 2, 3, 4)),
    )
    # Narrow heads make some settings coincide.
    return {name: tuple(dict.fromkeys(rung)) for name, rung in zip(NAMES, rungs, strict=True)}


def settings(method: Method) -> str:
    """Settings of a method that are not its defaults, as its constructor takes them."""
    values = asdict(method)
    changed = (f.name for f in fields(method) if values[f.name] != f.default)
    return ", ".join(f"{name}={values[name]!r}" for name in changed)
