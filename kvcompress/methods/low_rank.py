"""Low-rank compression: the principal components of every head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from kvcompress.arrays import FLOATING, Array, array_namespace, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.errors import (
    DTypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    check_fraction,
    check_integer,
    normalize,
)
from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.pca import Principal, principal_components, reconstruct, variances


@dataclass(frozen=True)
class LowRank(Method):
    """Keep the `rank` principal components of every head (PCA, Karhunen-Loeve transform).

    The squared error is the sum of the discarded eigenvalues of the head's covariance, the least
    any linear map of that rank can reach (Eckart and Young 1936). Basis, mean and scale of the head
    are stored with the coefficients, all in the dtype of the input but the scale.

    Parameters
    ----------
    rank : int
        Components kept, 1 to head_dim.

    Raises
    ------
    SettingError
        If `rank` is not a positive integer.
    """

    identifier = "LowRank"

    rank: int

    def __post_init__(self) -> None:
        normalize(self, rank=check_integer("rank", self.rank, 1))

    @classmethod
    def fit(cls, k: Array, v: Array | None = None, /, *, energy: float = 0.9) -> Self:
        """Choose the smallest rank that keeps `energy` of every head's variance.

        Looks at the values, so it is eager: it cannot run under ``jax.jit``.

        Parameters
        ----------
        k, v : arrays ``[..., seq_len, head_dim]``
            The tensors to be compressed; `v` is optional.
        energy : float
            Share of the variance about the mean to keep, in (0, 1].

        Raises
        ------
        NamespaceError, DTypeError, ShapeError, NonFiniteError, SettingError
        """
        check_fraction("energy", energy, low_open=True)
        ranks = [1]
        tensors = (k,) if v is None else (k, v)
        xp = array_namespace(*tensors)
        for x in tensors:
            if dtype_name(x.dtype) not in FLOATING:
                raise DTypeError(f"expected {', '.join(FLOATING)}, got {dtype_name(x.dtype)}")
            if x.ndim < 2:
                raise ShapeError(f"expected [..., seq_len, head_dim], got shape {tuple(x.shape)}")
            if not bool(xp.all(xp.isfinite(x))):
                raise NonFiniteError("the variance of values that are not finite is unknown")
            if 0 not in x.shape:
                spectrum = variances(xp.reshape(x, (-1, *x.shape[-2:])))
                spectrum = xp.clip(spectrum, min=0.0)
                kept = xp.cumulative_sum(spectrum, axis=-1)
                short = kept < energy * kept[..., -1:]
                ranks.append(1 + int(xp.max(xp.sum(xp.astype(short, xp.int32), axis=-1))))
        return cls(max(ranks))

    @classmethod
    def presets(cls, head_dims: Collection[int], /) -> tuple[Self, ...]:
        full = min(head_dims)
        return tuple(dict.fromkeys(cls(max(1, full * part // 4)) for part in (1, 2, 3)))

    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        heads, tokens, _ = spec.shape
        coefficients = TensorSpec((heads, tokens, self.rank), spec.dtype)
        return {"coefficients": coefficients, **basis_spec(spec, self.rank)}

    def encode(self, x: Array, role: Role, dispatch: Dispatcher) -> Payload:
        dtype = dtype_name(x.dtype)
        wide = dispatch(cast, x, dtype="float32")
        principal, coefficients = principal_components(wide, self.rank, dtype=dtype)
        return {"coefficients": dispatch(cast, coefficients, dtype=dtype), **principal._asdict()}

    def decode(self, payload: Payload, spec: TensorSpec, role: Role, dispatch: Dispatcher) -> Array:
        arrays = dict(payload)
        coefficients = dispatch(cast, arrays.pop("coefficients"), dtype="float32")
        return reconstruct(Principal(**arrays), coefficients)


def basis_spec(spec: TensorSpec, rank: int) -> Mapping[str, TensorSpec]:
    """Specs of a stored `Principal` of `rank` components.

    Raises
    ------
    SettingError
        If the rank exceeds head_dim.
    """
    heads, _, head_dim = spec.shape
    if rank > head_dim:
        raise SettingError(f"rank must be at most head_dim = {head_dim}, got {rank}")
    return {
        "basis": TensorSpec((heads, head_dim, rank), spec.dtype),
        "mean": TensorSpec((heads, 1, head_dim), spec.dtype),
        "scale": TensorSpec((heads, 1, 1), "float32"),
    }
