"""Hypothesis strategies for keys and values, their shapes and dtypes, methods and compressors.

Arrays are NumPy's (bfloat16 that of ``ml_dtypes``); convert them into the library under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvcompress.arrays import FLOAT16_MAX, FLOATING, dtype_of, namespace_of
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.compressor.validation import LARGEST
from kvcompress.methods import (
    GroupQuantization,
    Hybrid,
    LowRank,
    Method,
    RotatedQuantization,
    TransformCoding,
    VectorQuantization,
)
from kvcompress.ops.packing import CODE_BITS

NDArray: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]


def largest(dtype: str) -> float:
    """Largest magnitude the compressor accepts in the dtype called `dtype`."""
    return FLOAT16_MAX if dtype == "float16" else LARGEST


def kv_shapes(
    *,
    ndim: Literal[3, 4] = 4,
    max_heads: int = 3,
    max_tokens: int = 40,
    head_dims: Sequence[int] = (1, 2, 3, 5, 8, 16),
) -> SearchStrategy[tuple[Shape, Shape]]:
    """Shapes of keys and values that fit together, empty ones among them.

    Parameters
    ----------
    ndim : {3, 4}
        Whether there is a batch.
    max_heads, max_tokens : int
    head_dims : sequence of int
        What the two head_dim are drawn from.
    """
    lead = [st.integers(0, max_heads) for _ in range(ndim - 2)]
    head_dim = st.sampled_from(head_dims)
    parts = st.tuples(st.tuples(*lead, st.integers(0, max_tokens)), head_dim, head_dim)
    return parts.map(lambda p: ((*p[0], p[1]), (*p[0], p[2])))


@st.composite
def tensors(draw: st.DrawFn, shape: Shape, dtype: str = "float32") -> NDArray:
    """Finite keys or values of a shape and dtype, within what the compressor accepts.

    Smooth data, ties, constant channels, a channel that outweighs the others, offsets and all
    magnitudes; with zeros of both signs, denormals and the largest values in between.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("normal", "ties", "constant", "low rank", "zeros")))
    if kind == "normal":
        x = rng.standard_normal(shape)
    elif kind == "ties":
        x = rng.integers(-3, 4, shape) / 2
    elif kind == "constant":
        x = np.broadcast_to(rng.standard_normal(shape[-1:]), shape)
    elif kind == "low rank":
        x = rng.standard_normal((*shape[:-1], 1)) * rng.standard_normal(shape[-1:])
    else:
        x = np.zeros(shape)
    x = x + draw(st.sampled_from((0.0, 0.0, 7.0, -300.0)))
    if draw(st.booleans()):
        x[..., 0] *= 100.0
    limit, info = largest(dtype), _finfo(dtype)
    top = int(np.log2(limit))
    x *= 2.0 ** draw(st.sampled_from((0, 0, 0, -12, -99, -140, top - 8)))
    smallest = (float(info.smallest_subnormal), float(info.smallest_normal))
    special = (0.0, -0.0, *smallest, -smallest[0], 2.0**-14, 0.5, limit, -limit)
    where = st.integers(0, max(x.size, 1) - 1)
    for i, value in draw(st.lists(st.tuples(where, st.sampled_from(special)), max_size=5)):
        x.reshape(-1)[i : i + 1] = value
    return np.clip(x, -limit, limit).astype(_dtype(dtype))


@st.composite
def kv(
    draw: st.DrawFn,
    shapes: SearchStrategy[tuple[Shape, Shape]] | None = None,
    dtypes: Sequence[str] = FLOATING,
) -> tuple[NDArray, NDArray]:
    """Keys and values that fit together.

    Parameters
    ----------
    shapes : strategy, optional
        Such as `kv_shapes()`, its default.
    dtypes : sequence of str
        Names of the dtypes to draw from.
    """
    key_shape, value_shape = draw(kv_shapes() if shapes is None else shapes)
    dtype = draw(st.sampled_from(dtypes))
    return draw(tensors(key_shape, dtype)), draw(tensors(value_shape, dtype))


def methods(head_dim: int) -> SearchStrategy[Method]:
    """Methods of every kind whose settings fit `head_dim`."""
    rank = st.integers(1, head_dim)
    share = st.sampled_from((0.0, 0.01, 0.3, 1.0))
    group_size = st.sampled_from((2, 7, 64))
    axis = st.sampled_from(("channel", "token"))
    divisors = [None, *(d for d in range(1, head_dim + 1) if head_dim % d == 0)]
    return st.one_of(
        st.builds(LowRank, rank),
        st.builds(
            VectorQuantization,
            st.sampled_from((2, 3, 16, 100)),
            st.sampled_from(divisors),
            exact=share,
            iterations=st.integers(0, 3),
            seed=st.integers(0, 9),
        ),
        st.builds(Hybrid, rank, st.integers(0, 8), group_size, share),
        st.builds(GroupQuantization, st.sampled_from((0, *CODE_BITS)), group_size, axis, axis),
        st.builds(RotatedQuantization, st.integers(1, 8), st.integers(0, 9)),
        st.builds(TransformCoding, st.sampled_from((0.25, 1, 2.7, 8)), exact=share),
    )


def compressors(
    head_dim: int, value_head_dim: int | None = None
) -> SearchStrategy[KVCacheCompressor]:
    """Compressors whose methods fit keys of `head_dim` and values of `value_head_dim`."""
    exact = st.sampled_from((0, 0, 1, 4))
    same = value_head_dim in (None, head_dim)
    value_methods = methods(value_head_dim or head_dim)
    return st.builds(
        KVCacheCompressor,
        methods(head_dim),
        st.sampled_from(CODE_BITS),
        value_method=st.none() | value_methods if same else value_methods,
        sinks=exact,
        window=exact,
    )


def _dtype(name: str) -> Any:
    return dtype_of(namespace_of(np), name)


def _finfo(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        finfo: Any = ml_dtypes.finfo
        return finfo(name)
    return np.finfo(name)
