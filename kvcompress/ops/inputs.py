"""Calls of operations by example: arrays of a shape and dtype, and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from kvcompress.arrays import FLOAT16_MAX, Array, HostArray, dtype_of, namespace_of, to_host

Level: TypeAlias = Literal["every", "usual", "typical"]
"""Every setting there is, with values that are hard; those that are used; one of these."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Call:
    """Arguments of an operation.

    Parameters
    ----------
    arrays : tuple of arrays
    static : dict
        Keyword arguments.
    label : str
        Names the settings in tables.
    source : array, optional
        What is coded or restored, where that is not the first array.
    """

    arrays: tuple[Array, ...]
    static: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    source: Array | None = None


@dataclass(frozen=True)
class Inputs:
    """Makes the arrays of examples.

    Parameters
    ----------
    shape : tuple of int
        Heads, tokens and channels of the source.
    dtype : {"float16", "bfloat16", "float32"}
        Of the source.
    level : {"every", "usual", "typical"}
        Which settings are asked for, see `choose`. With "every", numbers contain ties, constant
        channels and extremes; with the others, they are normal.
    array : callable
        Copies an array of NumPy into the library of the examples.
    seed : int
    """

    shape: tuple[int, int, int]
    dtype: str
    level: Level = "every"
    array: Callable[[HostArray], Array] = np.asarray
    seed: int = 0
    rng: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rng", np.random.default_rng(self.seed))

    @property
    def channels(self) -> int:
        """Channels of the source."""
        return self.shape[-1]

    def choose(
        self,
        *,
        every: Sequence[Value],
        usual: Sequence[Value],
        typical: Sequence[Value] | None = None,
    ) -> Sequence[Value]:
        """Return the settings of the level; without `typical`, the usual ones are."""
        if self.level == "every":
            return every
        return usual if self.level == "usual" or typical is None else typical

    def tensor(
        self,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
        *,
        extreme: bool = True,
    ) -> Array:
        """Draw numbers, of the shape and dtype of the source where none are given.

        Without `extreme`, there are no denormals, and none so large that sums could overflow.
        """
        shape, dtype = shape or self.shape, dtype or self.dtype
        if self.level == "every":
            x = self._hard(shape, dtype, extreme)
        else:
            x = self.rng.standard_normal(shape, dtype=np.float32)
        return self.array(x.astype(dtype_of(namespace_of(np), dtype), copy=False))

    def integers(self, shape: tuple[int, ...], below: int, dtype: str = "uint8") -> Array:
        """Draw whole numbers from 0 to ``below - 1``."""
        return self.array(self.rng.integers(0, below, shape).astype(dtype))

    def codebook(self, shape: tuple[int, ...]) -> Array:
        """Draw centroids ``[..., size, dim]``, float32, of which the first two are equal."""
        x = np.array(self._hard(shape, "float32", extreme=False), dtype=np.float32)
        x[..., 1:2, :] = x[..., :1, :]
        return self.array(x)

    def paged(self, x: Array) -> tuple[Array, Array]:
        """Pool and slots that stand for ``x [heads, tokens, channels]``; some slots are unused."""
        host = to_host(x)
        heads, tokens, channels = host.shape
        pool = self._hard((tokens + 3, heads, channels), self.dtype).astype(host.dtype)
        slots = self.rng.permutation(tokens + 3)[:tokens].astype(np.int32)
        pool[slots] = host.transpose(1, 0, 2)
        return self.array(pool), self.array(slots)

    def _hard(self, shape: tuple[int, ...], dtype: str, extreme: bool = True) -> HostArray:
        """Values with ties, a constant channel and, if `extreme`, denormals and large ones."""
        x: HostArray = self.rng.standard_normal(shape)
        x[..., ::3] = np.round(2 * x[..., ::3]) / 2
        x[..., -1:] = 0.75
        x[..., 1:2] *= 0  # zeros of both signs
        if extreme and x.size:
            large = FLOAT16_MAX if dtype == "float16" else 2.0**126
            special = [0.0, -0.0, 2.0**-24, -(2.0**-130), large, -large]
            x.reshape(-1)[self.rng.integers(0, x.size, len(special))] = special
        return x
