"""Rotary position embeddings, done and undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from kvcompress.arrays import FLOATING, Array, array_namespace, astype, device, dtype_name
from kvcompress.errors import (
    DTypeError,
    SettingError,
    ShapeError,
    check_choice,
    check_integer,
    check_number,
    normalize,
)
from kvcompress.rope.config import read_rope
from kvcompress.rope.scaling import RopeScaling, base_frequencies

_MAGNITUDE = 2.0**6
"""Most that keys read from files may be stretched: what is accepted then fits float32."""

_FREQUENCY = 2.0**64
"""Most radians a token, in files."""


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
        Channels rotated, even: head_dim, its first part ("partial rotary"), or the width of a
        decoupled RoPE key.
    theta : float
        Base of the wavelengths.
    interleaved : bool
        Whether channels ``(2i, 2i + 1)`` make a pair (GPT-J, DeepSeek) or ``(i, i + dim / 2)``
        do (GPT-NeoX, Llama).
    head_dim : int
        Channels of a head, at least `dim`; 0 becomes `dim`. Those from `dim` on are left alone.
    scaling : RopeScaling, optional
        What the model does to reach beyond the context it was trained on, such as a
        `YarnScaling`.

    Raises
    ------
    SettingError
        If `dim` is not a positive even integer, `theta` not a finite number of at least 1,
        `head_dim` less than `dim`, or the scaling does not fit them.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    head_dim: int = 0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        dim = check_choice("dim", self.dim, range(2, 2**31, 2), "an even integer >= 2")
        theta = check_number("theta", self.theta, 1)
        if not isinstance(self.interleaved, bool):
            raise SettingError(f"interleaved must be True or False, got {self.interleaved!r}")
        head_dim = check_integer("head_dim", self.head_dim or dim, dim)
        normalize(self, dim=dim, theta=theta, head_dim=head_dim)
        if self.scaling is None:
            return
        if not isinstance(self.scaling, RopeScaling):
            raise SettingError(f"scaling must be a RopeScaling or None, got {self.scaling!r}")
        self.scaling.check(dim, theta)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON can carry; `from_dict` undoes it."""
        scaling = None if self.scaling is None else self.scaling.to_dict()
        return {**asdict(self), "scaling": scaling}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo `to_dict`.

        Raises
        ------
        SettingError
            If a setting or a kind of scaling is unknown.
        """
        if not isinstance(values, Mapping):
            raise SettingError(f"the settings of a RoPE must be a mapping, got {values!r}")
        known = values.get("scaling")
        scaling = None if known is None else RopeScaling.from_dict(known)
        try:
            return cls(**{**values, "scaling": scaling})
        except TypeError as error:
            raise SettingError(f"the settings of a RoPE do not fit: {error}") from error

    @classmethod
    def from_config(cls, config: Any, /, *, layer: int | str | None = None) -> Self | None:
        """Read the rotary embedding of a model from its configuration.

        The keys meant are those that the transformers library caches: of latent attention
        (DeepSeek-V2 and -V3), the RoPE key alone; of DeepSeek-V3, transformers stores that key with
        the channels reordered, so that the result is not interleaved although its weights are.
        Of multimodal models, the text model, for text, where the three positions of a token are
        the same.

        Parameters
        ----------
        config : configuration of transformers, or mapping like its ``config.json``
            transformers is not imported. Only a configuration object holds the defaults that
            ``config.json`` leaves out, such as the share of channels that a Phi rotates; a mapping
            is read as written.
        layer : int or str, optional
            Index of a layer, or its type (``"sliding_attention"``); needed where layers differ.

        Returns
        -------
        RoPE or None
            None if the model, or that layer of it, does not rotate its keys (GPT-2, Bloom, every
            fourth layer of SmolLM3): there is nothing to undo.

        Raises
        ------
        SettingError
            If layers differ and `layer` is not given, or there is no such layer.
        UnsupportedModel
            If the model rotates in a way that is not known here, or the configuration lacks a
            number.
        """
        found = read_rope(config, layer)
        return None if found is None else cls(**found)

    @property
    def depends_on_length(self) -> bool:
        """Whether `apply` and `undo` need `seq_len`."""
        return self.scaling is not None and self.scaling.depends_on_length

    @property
    def magnitude(self) -> float:
        """What `apply` multiplies by, besides rotating."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    def apply(self, x: Array, positions: Array, /, *, seq_len: int | None = None) -> Array:
        """Rotate tokens by their positions, and multiply them by the scaling's magnitude.

        Parameters
        ----------
        x : array ``[..., seq_len, head_dim]``, float16, bfloat16 or float32
        positions : integer array ``[seq_len]``, or any that broadcasts to ``[..., seq_len]``
            Of the library and on the device of `x`; exact up to 2**24.
        seq_len : int, optional
            Where `depends_on_length` (dynamic and LongRoPE scaling): length of the sequence for
            which the model rotated the tokens. To transformers that is the largest position of a
            forward pass, plus one: of the whole prompt, not of the tokens in `x`. Other scalings
            ignore it.

        Returns
        -------
        array
            Of the shape and dtype of `x`.

        Raises
        ------
        NamespaceError, ShapeError, DTypeError
            If the arrays are of two libraries, do not fit, or have another dtype.
        SettingError
            If `seq_len` is needed and missing, or no positive integer.
        """
        return self._rotate(x, positions, seq_len, forward=True)

    def undo(self, x: Array, positions: Array, /, *, seq_len: int | None = None) -> Array:
        """Rotate and scale tokens back: the reverse of `apply`, with the same parameters."""
        return self._rotate(x, positions, seq_len, forward=False)

    def _rotate(self, x: Array, positions: Array, seq_len: int | None, forward: bool) -> Array:
        xp = array_namespace(x, positions)
        self._check(x, positions, xp)
        frequencies = xp.asarray(self.frequencies(seq_len), device=device(x))
        angle = xp.astype(positions, xp.float32)[..., None] * frequencies
        cos, sin = xp.cos(angle), xp.sin(angle)
        if self.magnitude != 1.0:
            gain = self.magnitude if forward else 1 / self.magnitude
            cos, sin = cos * gain, sin * gain
        full, half = astype(x[..., : self.dim], "float32"), self.dim // 2
        if self.interleaved:
            a, b = full[..., 0::2], full[..., 1::2]
        else:
            a, b = full[..., :half], full[..., half:]
        if not forward:
            sin = -sin
        a, b = a * cos - b * sin, b * cos + a * sin
        if self.interleaved:
            rotated = xp.reshape(xp.stack([a, b], axis=-1), full.shape)
        else:
            rotated = xp.concat([a, b], axis=-1)
        rotated = astype(rotated, dtype_name(x.dtype))
        if self.dim == self.head_dim:
            return rotated
        return xp.concat([rotated, x[..., self.dim :]], axis=-1)

    def check_finite(self) -> None:
        """Check that what is rotated stays finite, in short sequences and in long ones.

        Raises
        ------
        SettingError
        """
        if not 1 / _MAGNITUDE <= self.magnitude <= _MAGNITUDE:
            raise SettingError(
                f"the magnitude of a RoPE must be from {1 / _MAGNITUDE:g} to {_MAGNITUDE:g}, "
                f"got {self.magnitude:g}"
            )
        for seq_len in (1, 1 << 24):
            with np.errstate(all="ignore"):
                found = float(np.max(np.abs(self.frequencies(seq_len))))
            if not found <= _FREQUENCY:
                raise SettingError(
                    f"a RoPE may turn {_FREQUENCY:g} radians per token, got {found:g}"
                )

    def frequencies(self, seq_len: int | None = None) -> np.ndarray[Any, Any]:
        """Radians per token of every pair, float32 ``[dim / 2]``, on the host.

        Raises
        ------
        SettingError
            If `seq_len` is needed (see `apply`) and missing, or no positive integer.
        """
        if seq_len is not None:
            check_integer("seq_len", seq_len, 1)
        if self.scaling is None:
            return base_frequencies(self.dim, self.theta)
        if self.scaling.depends_on_length and seq_len is None:
            raise SettingError(
                f"with {type(self.scaling).__name__}, frequencies depend on the length of the "
                "sequence the model saw: pass seq_len=, its largest position plus one"
            )
        return self.scaling.frequencies(self.dim, self.theta, seq_len)

    def _check(self, x: Array, positions: Array, xp: Any) -> None:
        if x.ndim < 2 or x.shape[-1] != self.head_dim:
            raise ShapeError(
                f"x must be [..., seq_len, {self.head_dim}], got shape {tuple(x.shape)}"
            )
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
