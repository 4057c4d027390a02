"""Principal components per head: the best linear map of given rank (Karhunen-Loeve transform)."""

from __future__ import annotations

from typing import NamedTuple

from kvcompress.arrays import (
    Array,
    array_namespace,
    astype,
    device,
    dtype_name,
    dtype_of,
    eigh,
)
from kvcompress.ops.affine import TINY

NOISE = 2.0**-46
"""Covariances below this, of magnitudes up to 1, are rounding errors of float32."""


class Principal(NamedTuple):
    """A linear code of every head: ``x ~= (coefficients @ basis.T + mean) * scale``.

    Attributes
    ----------
    basis : array ``[heads, channels, rank]``, dtype of the source
        Orthonormal columns, by falling variance.
    mean : array ``[heads, 1, channels]``, dtype of the source
    scale : array ``[heads, 1, 1]``, float32
        Largest magnitude of the head: what is divided by it fits every dtype and squares safely.
    """

    basis: Array
    mean: Array
    scale: Array


def principal_components(
    x: Array, rank: int, *, dtype: str | None = None
) -> tuple[Principal, Array]:
    """Fit the `rank` principal components of every head and project on them.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, floating
    rank : int
        1 to `channels`.
    dtype : {"float16", "bfloat16", "float32"}, optional
        Of basis and mean; that of `x` if left out.

    Returns
    -------
    principal : Principal
    coefficients : array ``[heads, tokens, rank]``, float32
        Magnitudes at most ``2 * sqrt(channels)``.
    """
    xp, dtype = array_namespace(x), dtype or dtype_name(x.dtype)
    centered, mean, scale = center(x, dtype=dtype)
    _, basis = _eigh(centered)
    # A copy in any case: a slice would keep all the components alive.
    basis = xp.astype(basis[..., :rank], dtype_of(xp, dtype))
    return Principal(basis, mean, scale), centered @ astype(basis, "float32")


def reconstruct(principal: Principal, coefficients: Array) -> Array:
    """Undo the projection of `principal_components`.

    Returns
    -------
    array ``[heads, tokens, channels]``, float32
    """
    xp = array_namespace(coefficients)
    basis, mean = (astype(a, "float32") for a in (principal.basis, principal.mean))
    x = astype(coefficients, "float32") @ xp.matrix_transpose(basis)
    x += mean
    x *= principal.scale
    return x


def variances(x: Array) -> Array:
    """Variance of every principal component over its head's largest, falling.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, floating

    Returns
    -------
    array ``[heads, channels]``, float32
        In units of the head's largest magnitude squared.
    """
    centered, _, _ = center(x)
    return _eigh(centered)[0]


def center(x: Array, *, dtype: str | None = None) -> tuple[Array, Array, Array]:
    """Scale every head to magnitudes of at most 1 and take its mean away.

    Parameters
    ----------
    x : array ``[heads, tokens, channels]``, floating
    dtype : {"float16", "bfloat16", "float32"}, optional
        Of the mean; that of `x` if left out.

    Returns
    -------
    centered : array ``[heads, tokens, channels]``, float32
        ``x / scale - mean``.
    mean : array ``[heads, 1, channels]`` of `dtype`
    scale : array ``[heads, 1, 1]``, float32
        Largest magnitude of the head, 1 for a head of zeros.
    """
    xp = array_namespace(x)
    name, (heads, tokens, _) = dtype or dtype_name(x.dtype), x.shape
    x = astype(x, "float32")
    if tokens:
        peak = xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
        scale = xp.where(peak < TINY, 1.0, peak)
    else:
        scale = xp.ones((heads, 1, 1), dtype=xp.float32, device=device(x))
    x = x / scale
    mean = astype(xp.sum(x, axis=-2, keepdims=True) / max(tokens, 1), name)
    x -= astype(mean, "float32")
    return x, mean, scale


def _eigh(centered: Array) -> tuple[Array, Array]:
    """Eigenvalues ``[heads, channels]`` and eigenvectors of the covariance, largest first."""
    xp = array_namespace(centered)
    covariance = xp.matrix_transpose(centered) @ centered / max(centered.shape[-2], 1)
    # Rounding errors that are left of constant heads; LAPACK may not converge on them.
    covariance = xp.where(xp.abs(covariance) < NOISE, 0.0, covariance)
    # Ascending, so largest variance first.
    values, vectors = eigh(-covariance)
    return -values, vectors
