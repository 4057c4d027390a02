"""How far decompressed keys and values are from the originals: in float64, on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcompress.arrays import HostArray, bisect
from kvcompress.errors import ShapeError

_BLOCK = 2**22
"""Attention weights held at a time."""


def relative_mse(x: HostArray, restored: HostArray, /) -> float:
    """Squared error over energy, ``|x - restored|^2 / |x|^2`` (Frobenius norms).

    The energy is taken about zero, not about the mean. 0 for two arrays of zeros, infinite where
    only `x` is zero.
    """
    return relative_error(x, restored) ** 2


def relative_error(x: HostArray, restored: HostArray, /) -> float:
    """Norm of the error over the norm, ``|x - restored| / |x|`` (Frobenius norms).

    Parameters
    ----------
    x, restored : arrays of one shape, any real dtype

    Raises
    ------
    ShapeError
        If the shapes differ.
    """
    if x.shape != restored.shape:
        raise ShapeError(f"expected two arrays of one shape, got {x.shape} and {restored.shape}")
    x = np.asarray(x, dtype=np.float64)
    error = np.linalg.norm(np.ravel(x - restored.astype(np.float64)))
    norm = np.linalg.norm(np.ravel(x))
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / norm)


def attention(
    q: HostArray, k: HostArray, v: HostArray, /, *, scale: float | None = None
) -> HostArray:
    """Causal attention output of grouped queries: ``softmax(scale * q @ k.T) @ v``.

    Parameters
    ----------
    q : array ``[..., num_heads, num_queries, head_dim]``
        Queries of the last tokens: query ``j`` sees the tokens up to and including
        ``seq_len - num_queries + j``. Query head ``h`` reads KV head
        ``h // (num_heads // num_kv_heads)``.
    k, v : arrays ``[..., num_kv_heads, seq_len, head_dim]``
        The head_dim of `v` may be another.
    scale : float, optional
        Factor of the logits; ``head_dim ** -0.5`` if left out.

    Returns
    -------
    array ``[..., num_heads, num_queries, head_dim of v]``, float64

    Raises
    ------
    ShapeError
        If the shapes do not fit together.
    """
    _check(q, k, v)
    *lead, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, seq_len, value_dim = v.shape[-3:]
    scale = head_dim**-0.5 if scale is None else scale
    grouped = (*lead, num_kv_heads, num_heads // num_kv_heads)
    queries = np.reshape(q, (*grouped, num_queries, head_dim))
    keys = np.swapaxes(np.expand_dims(np.asarray(k, dtype=np.float64), -3), -2, -1)
    values = np.expand_dims(np.asarray(v, dtype=np.float64), -3)
    output = np.empty((*grouped, num_queries, value_dim))
    for block in _blocks(num_queries, max(1, q[..., 0, 0].size * seq_len)):
        logits = queries[..., block, :].astype(np.float64) * scale @ keys
        position = np.arange(
            seq_len - num_queries + block.start, seq_len - num_queries + block.stop
        )
        logits = np.where(np.arange(seq_len) <= position[:, None], logits, -np.inf)
        weights = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
        weights /= np.sum(weights, axis=-1, keepdims=True)
        output[..., block, :] = weights @ values
    return np.reshape(output, (*lead, num_heads, num_queries, value_dim))


def attention_error(
    q: HostArray, original: tuple[HostArray, HostArray], restored: tuple[HostArray, HostArray], /
) -> float:
    """Relative error of the attention output: `relative_error` of `attention` over both caches.

    Parameters
    ----------
    q : array ``[..., num_heads, num_queries, head_dim]``
    original, restored : pairs of arrays ``[..., num_kv_heads, seq_len, head_dim]``
        Keys and values.
    """
    return relative_error(attention(q, *original), attention(q, *restored))


def rate_bound(
    q: HostArray, original: tuple[HostArray, HostArray], restored: tuple[HostArray, HostArray], /
) -> float:
    """Bits per value that normal keys and values of these covariances need for these errors.

    Reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3), head
    by head: of the keys in the metric of the queries, in which the squared error is that of the
    logits, and of the values over their norms. What a codec spends above it is what better coding
    could save on normal sources; others may need less.

    Parameters
    ----------
    q : array ``[num_heads, num_queries, head_dim]``
        Any queries that read these keys.
    original, restored : pairs of arrays ``[num_kv_heads, tokens, head_dim]``
        Keys and values.

    Returns
    -------
    float
        Infinite where there is no error, NaN without tokens or queries.
    """
    (k, v), (k_restored, v_restored) = (
        tuple(x.astype(np.float64) for x in pair) for pair in (original, restored)
    )
    heads, tokens, head_dim = k.shape
    if not tokens or not q.size:
        return float("nan")
    queries = q.astype(np.float64).reshape(heads, -1, head_dim)
    moment = np.swapaxes(queries, 1, 2) @ queries / queries.shape[1]
    values, vectors = np.linalg.eigh(moment)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    norm = np.where(norm > 0, norm, 1.0)
    total = _rate(k @ root, k_restored @ root) + _rate(v / norm, v_restored / norm)
    return float(total / (heads * (head_dim + v.shape[-1])))


def _rate(x: HostArray, restored: HostArray) -> float:
    """Bits of a token of all heads, ``x [heads, tokens, channels]``."""
    centered = x - np.mean(x, axis=1, keepdims=True)
    covariance = np.swapaxes(centered, 1, 2) @ centered / x.shape[1]
    variances = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
    error = np.mean(np.sum((x - restored) ** 2, axis=-1), axis=-1, keepdims=True)
    if np.any((error == 0) & np.any(variances > 0, axis=-1, keepdims=True)):
        return float("inf")

    def below(level: HostArray) -> HostArray:
        return np.asarray(np.sum(np.minimum(variances, level), axis=-1, keepdims=True) <= error)

    largest = np.max(variances, axis=-1, keepdims=True)
    level = bisect(below, np.zeros_like(error), largest, steps=200)
    ratio = variances / np.where(level > 0, level, 1.0)
    return float(np.sum(np.log2(np.maximum(ratio, 1.0))) / 2)


def _check(q: HostArray, k: HostArray, v: HostArray) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"k and v must agree in all sizes but the last, got {shapes}")
    if min(q.ndim, k.ndim) < 3:
        raise ShapeError(
            "expected q [..., num_heads, num_queries, head_dim] and "
            f"k, v [..., num_kv_heads, seq_len, head_dim], got {shapes}"
        )
    if q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"q and k must agree in batch and head_dim, got {shapes}")
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ShapeError(f"num_heads of q must be a multiple of that of k, got {shapes}")
    if q.shape[-2] > k.shape[-2]:
        raise ShapeError(
            f"q must be the queries of the last tokens, got more than seq_len: {shapes}"
        )


def _blocks(num_queries: int, weights_per_query: int) -> Iterator[slice]:
    step = max(1, _BLOCK // weights_per_query)
    return (slice(i, min(i + step, num_queries)) for i in range(0, num_queries, step))
