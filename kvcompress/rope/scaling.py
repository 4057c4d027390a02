"""How models stretch rotary embeddings to contexts longer than they were trained on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.errors import SettingError, check_fraction, check_integer, check_positive, normalize


def base_frequencies(dim: int, theta: float) -> HostArray:
    """Radians per token of every pair, ``theta**(-2i / dim)``, as float32 ``[dim / 2]``."""
    return np.float32(1) / _wavelengths(dim, theta)


def _wavelengths(dim: int, theta: float) -> HostArray:
    """``theta**(2i / dim)``, rounded to float32 where transformers and vLLM round.

    Keys were rotated by the frequencies a model computed, not by exact ones, and at long positions
    the difference shows. The power itself is float64: correctly rounded, the same on every machine.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.float64(np.float32(theta)) ** exponent.astype(np.float64)
    return power.astype(np.float32)


@dataclass(frozen=True)
class RopeScaling(ABC):
    """Base of the scalings: what becomes of the frequencies of a `RoPE`.

    Frequencies are float32, rounded where transformers rounds them.

    Attributes
    ----------
    depends_on_length : bool
        Whether frequencies follow the length of the sequence, so that `RoPE` must be told it.
    """

    depends_on_length: ClassVar[bool] = False

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by ("attention factor", "mscale")."""
        return 1.0

    def check(self, dim: int, theta: float) -> None:  # noqa: B027 (some fit any `RoPE`)
        """Raise `SettingError` if the settings do not fit those of the `RoPE`."""

    @abstractmethod
    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        """Radians per token of every pair, float32 ``[dim / 2]``."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON can carry; `from_dict` undoes it."""
        return {"kind": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RopeScaling:
        """Undo `to_dict`.

        Raises
        ------
        SettingError
            If the kind of scaling or one of its settings is unknown.
        """
        if not isinstance(values, Mapping):
            raise SettingError(f"the settings of a scaling must be a mapping, got {values!r}")
        kinds = {kind.__name__: kind for kind in RopeScaling.__subclasses__()}
        # JSON has no tuples.
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        name = settings.pop("kind", None)
        if not isinstance(name, str) or name not in kinds:
            raise SettingError(f"unknown scaling {name!r}; known: {', '.join(sorted(kinds))}")
        try:
            return kinds[name](**settings)
        except TypeError as error:
            raise SettingError(f"the settings of {name} do not fit: {error}") from error


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595).

    Parameters
    ----------
    factor : float
        Positive.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    factor: float

    def __post_init__(self) -> None:
        normalize(self, factor=check_positive("factor", self.factor))

    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        return base_frequencies(dim, theta) / np.float32(self.factor)


@dataclass(frozen=True)
class ProportionalScaling(RopeScaling):
    """Only the faster pairs rotate, the wavelengths being those of the whole head (Gemma 4).

    Parameters
    ----------
    rotated : float
        Share of the pairs that rotate, in (0, 1].
    factor : float
        What positions are divided by.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    rotated: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        rotated = check_fraction("rotated", self.rotated, low_open=True)
        normalize(self, rotated=rotated, factor=check_positive("factor", self.factor))

    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        frequencies = base_frequencies(dim, theta) / np.float32(self.factor)
        frequencies[int(self.rotated * dim // 2) :] = 0
        return frequencies


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """A base that grows with the sequence, beyond a length ("dynamic NTK").

    A model with a growing cache rotates every token by the frequencies of the length it had then.

    Parameters
    ----------
    factor : float
        Positive.
    max_positions : int
        Length up to which nothing is scaled.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    depends_on_length: ClassVar[bool] = True

    factor: float
    max_positions: int

    def __post_init__(self) -> None:
        normalize(
            self,
            factor=check_positive("factor", self.factor),
            max_positions=check_integer("max_positions", self.max_positions, 1),
        )

    def check(self, dim: int, theta: float) -> None:
        if dim < 4:
            raise SettingError(f"dim must be at least 4 with DynamicScaling, got {dim}")

    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        if seq_len is None or seq_len <= self.max_positions:
            return base_frequencies(dim, theta)
        # float32 from here on, because the model takes the length from an array on its device.
        stretched = np.float32(self.factor) * np.float32(seq_len) / np.float32(self.max_positions)
        growth = np.float64(stretched - np.float32(self.factor - 1)) ** (dim / (dim - 2))
        return base_frequencies(dim, float(np.float32(theta) * np.float32(growth)))


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Slow pairs interpolated, fast ones kept, a ramp between (Peng et al. 2023, arXiv 2309.00071).

    Parameters
    ----------
    factor : float
        Positive: how much longer the context became.
    original_max_positions : int
        Context length before.
    attention_factor : float or None
        `magnitude`; ``0.1 * log(factor) + 1`` if None.
    beta_fast, beta_slow : float
        Rotations within the original context that end and begin the ramp.
    truncate : bool
        Whether the ramp begins and ends at whole pairs.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    factor: float
    original_max_positions: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.truncate, bool):
            raise SettingError(f"truncate must be True or False, got {self.truncate!r}")
        for name in ("factor", "beta_fast", "beta_slow"):
            normalize(self, **{name: check_positive(name, getattr(self, name))})
        if self.attention_factor is not None:
            factor = check_positive("attention_factor", self.attention_factor)
            normalize(self, attention_factor=factor)
        most = check_integer("original_max_positions", self.original_max_positions, 1)
        normalize(self, original_max_positions=most)

    def check(self, dim: int, theta: float) -> None:
        if theta == 1:
            raise SettingError("theta must be above 1 with YarnScaling, got 1")
        try:
            self._ramp(dim, theta)
        except (ArithmeticError, ValueError) as error:
            raise SettingError(
                f"beta_fast and beta_slow must be rotations within the original context, "
                f"got {self.beta_fast} and {self.beta_slow}"
            ) from error

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return yarn_magnitude(self.factor)

    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        one, wavelengths = np.float32(1), _wavelengths(dim, theta)
        kept = one / wavelengths
        interpolated = one / (np.float32(self.factor) * wavelengths)
        low, high = self._ramp(dim, theta)
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        share = one - np.clip(ramp, np.float32(0), one)
        blend: HostArray = interpolated * (one - share) + kept * share
        return blend

    def _ramp(self, dim: int, theta: float) -> tuple[float, float]:
        """The pairs that end and begin it: they turn `beta_fast` and `beta_slow` times."""
        full_turns = self.original_max_positions / (2 * math.pi)
        low, high = (
            dim * math.log(full_turns / beta) / (2 * math.log(theta))
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if low == high else high


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by, per `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Long wavelengths stretched, short ones kept, a ramp between (Llama 3.1).

    Parameters
    ----------
    factor : float
        What the frequencies of long wavelengths are divided by.
    original_max_positions : int
        Context length before.
    low_freq_factor, high_freq_factor : float
        A wavelength is long above ``original_max_positions / low_freq_factor``, short below
        ``original_max_positions / high_freq_factor``.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            normalize(self, **{name: check_positive(name, getattr(self, name))})
        most = check_integer("original_max_positions", self.original_max_positions, 1)
        normalize(self, original_max_positions=most)
        if self.low_freq_factor >= self.high_freq_factor:
            raise SettingError(
                f"low_freq_factor must be below high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )

    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        f32 = np.float32
        frequencies, factor = base_frequencies(dim, theta), f32(self.factor)
        context, low, high = (
            self.original_max_positions,
            self.low_freq_factor,
            self.high_freq_factor,
        )
        wavelengths = (
            f32(1) / frequencies * f32(2 * math.pi)
        )  # in the order in which PyTorch rounds
        smooth = (f32(1) / wavelengths * f32(context) - f32(low)) / f32(high - low)
        between = (f32(1) - smooth) * frequencies / factor + smooth * frequencies
        scaled = np.where(wavelengths > f32(context / low), frequencies / factor, between)
        return np.where(wavelengths < f32(context / high), frequencies, scaled)


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """A factor per pair, one set for short and one for long sequences (arXiv 2402.13753).

    Engines differ in when they switch: transformers for each call, by the largest position in it;
    vLLM once, by the longest sequence it was started for.

    Parameters
    ----------
    short_factors, long_factors : tuple of float, one per pair
        What frequencies are divided by.
    original_max_positions : int
        Longest sequence that is short.
    attention_factor : float
        `magnitude`.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    depends_on_length: ClassVar[bool] = True

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("short_factors", "long_factors"):
            factors: Any = getattr(self, name)
            if not isinstance(factors, tuple):
                raise SettingError(f"{name} must be a tuple, got {type(factors).__name__}")
            for factor in factors:
                check_positive(name, factor)
        most = check_integer("original_max_positions", self.original_max_positions, 1)
        normalize(self, original_max_positions=most)
        factor = check_positive("attention_factor", self.attention_factor)
        normalize(self, attention_factor=factor)

    @property
    def magnitude(self) -> float:
        return float(self.attention_factor)

    def check(self, dim: int, theta: float) -> None:
        for name in ("short_factors", "long_factors"):
            count = len(getattr(self, name))
            if count != dim // 2:
                raise SettingError(f"{name} must have dim / 2 = {dim // 2} entries, got {count}")

    def frequencies(self, dim: int, theta: float, seq_len: int | None) -> HostArray:
        long = seq_len is not None and seq_len > self.original_max_positions
        factors = np.asarray(self.long_factors if long else self.short_factors, dtype=np.float32)
        return np.float32(1) / (factors * _wavelengths(dim, theta))
