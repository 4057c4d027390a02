"""Group quantization: affine codes for short groups of values, without any transform."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.errors import SettingError, check_choice, check_integer, normalize
from kvcompress.methods import _grouped
from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.clipping import clip_groups
from kvcompress.ops.packing import CODE_BITS


@dataclass(frozen=True)
class GroupQuantization(Method):
    """Quantize groups of values between their minimum and maximum.

    Keys per channel, values per token: KIVI (Liu et al. 2024, arXiv 2402.02750). Two things are
    done better: with 2 bits every group is clipped to the range that serves it best in squares, and
    below 8 bits minima and maxima are themselves quantized, in 8 bits and groups of 32. With 8 bits
    they are kept exact, or they would add as much error as the codes.

    Parameters
    ----------
    bits : {0, 2, 3, 4, 8}
        Bits of a code; 0 takes the `quant_bits` of the compressor.
    group_size : int
        Values in a group; the last group of a row may be shorter.
    key_axis, value_axis : {"channel", "token"}
        "channel": a group is `group_size` tokens of one channel; "token": the reverse.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    identifier = "GroupQuantization"

    by_operations = True

    bits: int = 0
    group_size: int = 64
    key_axis: Literal["channel", "token"] = "channel"
    value_axis: Literal["channel", "token"] = "token"

    def __post_init__(self) -> None:
        bits = check_choice("bits", self.bits, (0, *CODE_BITS), "2, 3, 4, 8, or 0 for quant_bits")
        normalize(self, bits=bits, group_size=check_integer("group_size", self.group_size, 2))
        for name in ("key_axis", "value_axis"):
            axis = getattr(self, name)
            if axis not in ("channel", "token"):
                raise SettingError(f'{name} must be "channel" or "token", got {axis!r}')

    def bind(self, quant_bits: int) -> Self:
        return self if self.bits else replace(self, bits=quant_bits)

    @classmethod
    def presets(cls, head_dims: Collection[int], /) -> tuple[Self, ...]:
        settings = ((2, 64), (2, 32), (3, 64), (4, 64), (8, 64))
        return tuple(cls(bits, size) for bits, size in settings)

    @classmethod
    def at_bits(cls, bits: float, /) -> Self | None:
        return cls(int(bits)) if bits in CODE_BITS else None

    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        return _grouped.encoded_spec(self._affine(spec.dtype, role), spec)

    def encode(self, x: Array, role: Role, dispatch: Dispatcher) -> Payload:
        affine = self._affine(dtype_name(x.dtype), role)
        if self.bits == 2:
            x = dispatch(clip_groups, x, spec=affine)
        return _grouped.encode(affine, x, dispatch)

    def decode(self, payload: Payload, spec: TensorSpec, role: Role, dispatch: Dispatcher) -> Array:
        affine = self._affine(spec.dtype, role)
        return _grouped.decode(affine, payload, spec, dispatch, dtype=spec.dtype)

    def _affine(self, dtype: str, role: Role) -> AffineSpec:
        if not self.bits:
            raise SettingError(
                "bits = 0 stands for the compressor's quant_bits; use GroupQuantization through one"
            )
        axis = self.key_axis if role == "keys" else self.value_axis
        return AffineSpec(self.bits, self.group_size, axis, dtype)
