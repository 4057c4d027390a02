"""Rotary position embeddings, done and undone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress._namespace import FLOATING, Array, array_namespace, astype, device, dtype_name
from kvcompress.errors import DTypeError, SettingError, ShapeError


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    Pair ``i`` of the channels of a token at position ``p`` is rotated by ``p / theta**(2i / dim)``
    radians. Frequencies, angles and products are float32, computed the way models compute them
    (transformers, vLLM), so that `undo` meets what a model did rather than the exact angle: the two
    differ by up to ``p * 2**-22`` radians (0.24 at a million), but `undo` after `apply` only by
    the rounding of the results. Works inside ``jax.jit``.

    Parameters
    ----------
    dim : int
        Channels rotated, even: head_dim, or the width of a decoupled RoPE key.
    theta : float
        Base of the wavelengths.
    interleaved : bool
        Whether channels ``(2i, 2i + 1)`` make a pair (GPT-J, DeepSeek) or ``(i, i + dim / 2)``
        do (GPT-NeoX, Llama).

    Raises
    ------
    SettingError
        If `dim` is no positive even integer, or `theta` no finite number of at least 1.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        dim: Any = self.dim  # whatever the caller passed, not what the annotation promises
        theta: Any = self.theta
        if not isinstance(dim, int) or dim < 2 or dim % 2:
            raise SettingError(f"dim must be an even integer >= 2, got {dim!r}")
        if not isinstance(theta, int | float) or not 1 <= theta < math.inf:
            raise SettingError(f"theta must be a finite number >= 1, got {theta!r}")
        if not isinstance(self.interleaved, bool):
            raise SettingError(f"interleaved must be True or False, got {self.interleaved!r}")

    def apply(self, x: Array, positions: Array, /) -> Array:
        """Rotate tokens by their positions.

        Parameters
        ----------
        x : array ``[..., seq_len, dim]``, float16, bfloat16 or float32
        positions : integer array ``[seq_len]``, or any that broadcasts to ``[..., seq_len]``
            Of the library and on the device of `x`; exact up to 2**24.

        Returns
        -------
        array
            Of the shape and dtype of `x`.

        Raises
        ------
        NamespaceError, ShapeError, DTypeError
            If the arrays are of two libraries, do not fit, or have another dtype.
        """
        return self._rotate(x, positions, direction=1.0)

    def undo(self, x: Array, positions: Array, /) -> Array:
        """Rotate tokens back: the reverse of `apply`, with the same parameters."""
        return self._rotate(x, positions, direction=-1.0)

    def _rotate(self, x: Array, positions: Array, direction: float) -> Array:
        xp = array_namespace(x, positions)
        self._check(x, positions, xp)
        frequencies = xp.asarray(self._frequencies(), device=device(x))
        angle = xp.astype(positions, xp.float32)[..., None] * frequencies
        cos, sin = xp.cos(angle), direction * xp.sin(angle)
        full, half = astype(x, "float32"), self.dim // 2
        if self.interleaved:
            a, b = full[..., 0::2], full[..., 1::2]
            rotated = xp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
            rotated = xp.reshape(rotated, x.shape)
        else:
            a, b = full[..., :half], full[..., half:]
            rotated = xp.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return astype(rotated, dtype_name(x.dtype))

    def _frequencies(self) -> np.ndarray[Any, Any]:
        """Radians per token of every pair, rounded at each step as transformers and vLLM do."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return np.float32(1.0) / np.float32(self.theta) ** exponent

    def _check(self, x: Array, positions: Array, xp: Any) -> None:
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ShapeError(f"x must be [..., seq_len, {self.dim}], got shape {tuple(x.shape)}")
        if dtype_name(x.dtype) not in FLOATING:
            raise DTypeError(f"x must be one of {', '.join(FLOATING)}, got {dtype_name(x.dtype)}")
        if not xp.isdtype(positions.dtype, "integral"):
            raise DTypeError(f"positions must be integers, got {dtype_name(positions.dtype)}")
        tokens = tuple(x.shape[:-1])
        if not _broadcasts(tuple(positions.shape), tokens):
            raise ShapeError(
                f"positions must broadcast to {tokens}, got shape {tuple(positions.shape)}"
            )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
