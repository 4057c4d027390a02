"""What transform coding codes one layer with: bases and codebooks, trained once, used for ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kvcompress.arrays import HostArray, digest
from kvcompress.calibration.format import check_parameters
from kvcompress.calibration.ropes import rope_array
from kvcompress.rope import RoPE


@dataclass(frozen=True, eq=False)
class RoleParameters:
    """What codes the keys, or the unit values, of one layer; float32 NumPy arrays on the host.

    A unit is what is coded together: a head, or all heads of the layer side by side.

    Attributes
    ----------
    forward : array ``[units, unit_dim, components]``
        Takes a token to coefficients.
    codebooks : tuple of arrays ``[units, 256, dim]``
        One for each sub-vector of the coefficients.
    backward : array ``[units, components, unit_dim]``
        Takes coefficients back.
    offset : array ``[units, 1, unit_dim]``
        What is then added: the mean of all that has no coefficient.
    """

    forward: HostArray
    codebooks: tuple[HostArray, ...]
    backward: HostArray
    offset: HostArray

    @property
    def arrays(self) -> Mapping[str, HostArray]:
        """Every array, by name."""
        books = {f"codebooks.{i}": book for i, book in enumerate(self.codebooks)}
        matrices = {"forward": self.forward, "backward": self.backward, "offset": self.offset}
        return {**matrices, **books}

    @classmethod
    def of(cls, arrays: Mapping[str, HostArray]) -> RoleParameters:
        """Undo `arrays`."""
        books = tuple(arrays[f"codebooks.{i}"] for i in range(len(arrays) - 3))
        return cls(arrays["forward"], books, arrays["backward"], arrays["offset"])


@dataclass(frozen=True, eq=False)
class LayerParameters:
    """Bases and codebooks of one layer at one rate.

    Equal, and hashed, by their values: see `fingerprint`.

    Attributes
    ----------
    bits : float
        Bits per value it was trained for.
    keys, values : RoleParameters
    log_norm : array ``[heads]``, float32
        Binary logarithm of a norm of a value, about which norms are coded.
    key_norms : array ``[heads, 3]``, float32
        Binary logarithms of norms of keys: of a usual one, of the least, and of the largest that
        are coded as they are. Keys of other norms are coded as if they were usual.
    rope : RoPE or None
        What `keys` are coded before: it is undone of the keys first, and done when they are
        restored.
    """

    bits: float
    keys: RoleParameters
    values: RoleParameters
    log_norm: HostArray
    key_norms: HostArray
    rope: RoPE | None = None

    @property
    def arrays(self) -> Mapping[str, HostArray]:
        """Every array, by name."""
        roles = {"keys": self.keys, "values": self.values}
        parts = {f"{role}.{n}": x for role, code in roles.items() for n, x in code.arrays.items()}
        return {"log_norm": self.log_norm, "key_norms": self.key_norms, **parts}

    @classmethod
    def of(cls, bits: float, arrays: Mapping[str, HostArray]) -> LayerParameters:
        """Undo `arrays`, without a RoPE.

        Raises
        ------
        CalibrationError
            If they are not such arrays, or restore numbers that are not finite.
        """

        def part(role: str) -> RoleParameters:
            lead = f"{role}."
            return RoleParameters.of(
                {n.removeprefix(lead): x for n, x in arrays.items() if n.startswith(lead)}
            )

        check_parameters(arrays)
        return cls(bits, part("keys"), part("values"), arrays["log_norm"], arrays["key_norms"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all arrays and the RoPE, in hexadecimal: who has the same decodes the same."""
        return digest({**self.arrays, **rope_array(self.rope)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerParameters) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"LayerParameters({self.bits:g} bits, {self.fingerprint[:12]})"
