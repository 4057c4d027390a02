"""What the projections of latent attention have in common: how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from kvcompress.arrays import FLOATING, Array, array_namespace, device, dtype_name, is_concrete
from kvcompress.errors import DTypeError, NamespaceError, ShapeError


class LatentAttention(Protocol):
    """What `MlaCompressedKVCache` asks of the latent attention of a layer."""

    @property
    def weight(self) -> Array:
        """One of the projections, whose library, dtype and device the others have."""

    @property
    def dtype(self) -> str:
        """Name of the dtype of the projections."""

    @property
    def cached_sizes(self) -> tuple[int, int, int]:
        """Heads, width of what is cached as keys, width of what is cached as values."""

    def check(self) -> None:
        """Check that the projections fit together."""

    def restore_cached(self, k: Array, v: Array, /) -> tuple[Array, Array]:
        """Restore keys and values ``[num_heads, tokens, head_dim]`` from what is cached."""


def check_like(name: str, x: Array, weight_name: str, weight: Array) -> None:
    """Check that `x` has the library, dtype and device of a projection.

    Raises
    ------
    NamespaceError, DTypeError
    """
    array_namespace(x, weight)
    kind, where = dtype_name(weight.dtype), device(weight)
    if dtype_name(x.dtype) != kind:
        raise DTypeError(
            f"{name} must have the dtype of {weight_name}, {kind}, got {dtype_name(x.dtype)}"
        )
    if is_concrete(x) and is_concrete(weight) and device(x) != where:
        raise NamespaceError(
            f"{name} must be on the device of {weight_name}, {where}, got {device(x)}"
        )


def check_projections(
    arrays: Mapping[str, tuple[Any, tuple[str, ...]]], sizes: Mapping[str, int] | None = None
) -> None:
    """Check that projections fit together.

    Parameters
    ----------
    arrays : mapping of str to (array or None, names of its axes)
        Axes of the same name have the same size. None is a projection that is left out.
    sizes : mapping of str to int, optional
        Sizes of axes that are known otherwise.

    Raises
    ------
    NamespaceError, DTypeError, ShapeError
    """
    given = {name: (x, axes) for name, (x, axes) in arrays.items() if x is not None}
    array_namespace(*(x for x, _ in given.values()))
    first, (weight, _) = next(iter(given.items()))
    if dtype_name(weight.dtype) not in FLOATING:
        raise DTypeError(
            f"{first} must be one of {', '.join(FLOATING)}, got {dtype_name(weight.dtype)}"
        )
    known = dict(sizes or {})
    for name, (x, axes) in given.items():
        check_like(name, x, first, weight)
        expected = ", ".join(f"{axis} = {known[axis]}" if axis in known else axis for axis in axes)
        if x.ndim != len(axes) or any(
            size != known.setdefault(axis, size) or size < 1
            for axis, size in zip(axes, x.shape, strict=True)
        ):
            raise ShapeError(f"{name} must be [{expected}], got shape {tuple(x.shape)}")
