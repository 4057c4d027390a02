"""Hybrid compression: principal components, group-quantized, the largest outliers exact."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Self

from kvcompress.arrays import Array, array_namespace, astype, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.errors import SettingError, check_fraction, check_integer, normalize
from kvcompress.methods import _grouped
from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.methods.low_rank import basis_spec
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.outliers import gather_rows, largest, put_rows
from kvcompress.ops.pca import Principal, principal_components, reconstruct


@dataclass(frozen=True)
class Hybrid(Method):
    """Quantize the coefficients of the `rank` principal components of every head.

    Groups run along the tokens of one component, so that each component has steps of its own; below
    8 bits minima and maxima are themselves quantized, in 8 bits and groups of 32. The coefficients
    farthest from zero, in standard deviations of their component, are kept exact and widen no group
    (dense and sparse, as in KVQuant, Hooper et al. 2024, arXiv 2401.18079).

    Parameters
    ----------
    rank : int
        Components kept, 1 to head_dim.
    quant_bits : {0, 1, ..., 8}
        Bits of a coefficient; 0 takes the `quant_bits` of the compressor.
    group_size : int
        Tokens in a group.
    outliers : float
        Share of the coefficients kept exact, in [0, 1], an insurance against spikes; each costs its
        dtype and 32 bits.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    identifier = "Hybrid"

    rank: int
    quant_bits: int = 0
    group_size: int = 64
    outliers: float = 0.001

    def __post_init__(self) -> None:
        normalize(
            self,
            rank=check_integer("rank", self.rank, 1),
            quant_bits=check_integer("quant_bits", self.quant_bits, 0, 8),
            group_size=check_integer("group_size", self.group_size, 2),
            outliers=check_fraction("outliers", self.outliers),
        )

    def bind(self, quant_bits: int) -> Self:
        return self if self.quant_bits else replace(self, quant_bits=quant_bits)

    @classmethod
    def presets(cls, head_dims: Collection[int], /) -> tuple[Self, ...]:
        full = min(head_dims)
        half = max(1, full // 2)
        settings = ((half, 2), (half, 3), (half, 4), (full, 2), (full, 3), (full, 4), (full, 8))
        return tuple(dict.fromkeys(cls(rank, bits) for rank, bits in settings))

    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        heads, tokens, _ = spec.shape
        if self.outliers and tokens * self.rank >= 2**31:
            raise SettingError(
                "outliers are numbered in 32 bits, so seq_len * rank must be below 2**31, got "
                f"{tokens} * {self.rank}; set outliers=0 or compress fewer tokens at a time"
            )
        kept = (heads, self._kept(tokens))
        return {
            **_grouped.encoded_spec(self._affine(spec.dtype), self._coefficients(spec)),
            "outlier_index": TensorSpec(kept, "int32", tokens * self.rank),
            "outlier_value": TensorSpec(kept, spec.dtype),
            **basis_spec(spec, self.rank),
        }

    def encode(self, x: Array, role: Role, dispatch: Dispatcher) -> Payload:
        xp, dtype = array_namespace(x), dtype_name(x.dtype)
        heads, tokens, _ = x.shape
        wide = dispatch(cast, x, dtype="float32")
        principal, coefficients = principal_components(wide, self.rank, dtype=dtype)
        index, value = self._outliers(coefficients)
        if index.shape[1]:
            flat = xp.reshape(coefficients, (heads, tokens * self.rank))
            flat = put_rows(flat, index, xp.zeros_like(value), overwrite=True)
            coefficients = xp.reshape(flat, coefficients.shape)
        return {
            **_grouped.encode(self._affine(dtype), coefficients, dispatch),
            "outlier_index": index,
            "outlier_value": astype(value, dtype),
            **principal._asdict(),
        }

    def decode(self, payload: Payload, spec: TensorSpec, role: Role, dispatch: Dispatcher) -> Array:
        xp = array_namespace(*payload.values())
        heads, tokens, _ = spec.shape
        affine = self._affine(spec.dtype)
        coefficients = _grouped.decode(affine, payload, self._coefficients(spec), dispatch)
        flat = xp.reshape(coefficients, (heads, tokens * self.rank))
        value = astype(payload["outlier_value"], "float32")
        flat = put_rows(flat, payload["outlier_index"], value, overwrite=True)
        principal = Principal(*(payload[name] for name in Principal._fields))
        return reconstruct(principal, xp.reshape(flat, coefficients.shape))

    def _affine(self, dtype: str) -> AffineSpec:
        if not self.quant_bits:
            raise SettingError("quant_bits = 0 stands for the compressor's; use Hybrid through one")
        return AffineSpec(self.quant_bits, self.group_size, "channel", dtype)

    def _coefficients(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec((*spec.shape[:-1], self.rank), spec.dtype)

    def _kept(self, tokens: int) -> int:
        return math.ceil(self.outliers * tokens * self.rank)

    def _outliers(self, coefficients: Array) -> tuple[Array, Array]:
        """Positions and values of the coefficients to keep, in the heads laid flat."""
        xp = array_namespace(coefficients)
        heads, tokens, rank = coefficients.shape
        flat = (heads, tokens * rank)
        variance = xp.sum(coefficients * coefficients, axis=-2, keepdims=True)
        score = xp.abs(coefficients) / xp.sqrt(xp.where(variance > 0, variance, 1.0))
        index = largest(xp.reshape(score, flat), self._kept(tokens))
        return index, gather_rows(xp.reshape(coefficients, flat), index)
