"""What the Array API leaves out, or libraries are not equally quick at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import array_api_extra as xpx

from kvcompress.arrays.namespace import Array, astype, device, is_concrete


def quotient(numerator: float, x: Array, zero: Array) -> Array:
    """Divide a number by an array; 0 where `zero`."""
    xp = compat.array_namespace(x)
    x = xp.where(zero, 1.0, x)
    # Array by array: PyTorch takes number / array for the number times a rounded reciprocal.
    return xp.where(zero, 0.0, xp.full_like(x, numerator) / x)


def map_blocks(function: Callable[..., Any], rows: int, *arrays: Array) -> Any:
    """Apply `function`, which maps rows one by one, to at most `rows` rows of `arrays` at a time.

    It returns an array or a tuple of arrays of as many rows.
    """
    xp = compat.array_namespace(*arrays)
    count, rest = divmod(arrays[0].shape[0], rows)
    if count == 0 or (count, rest) == (1, 0):
        return function(*arrays)
    if compat.is_torch_namespace(xp) and not is_concrete(arrays[0]):
        return function(*arrays)  # its compiler would write the loop out
    end = count * rows
    if compat.is_jax_namespace(xp):
        # A loop of slices would be compiled block by block, and all blocks held at once.
        jax = sys.modules["jax"]
        blocks = [xp.reshape(x[:end, ...], (count, rows, *x.shape[1:])) for x in arrays]
        mapped = jax.lax.map(lambda block: function(*block), blocks)
        parts = [jax.tree.map(lambda x: xp.reshape(x, (end, *x.shape[2:])), mapped)]
    else:
        parts = [function(*(x[i : i + rows, ...] for x in arrays)) for i in range(0, end, rows)]
    if rest:
        parts.append(function(*(x[end:, ...] for x in arrays)))
    if isinstance(parts[0], tuple):
        return tuple(xp.concat(list(part), axis=0) for part in zip(*parts, strict=True))
    return xp.concat(parts, axis=0)


def map_matrices(function: Callable[[Array], Any], stack: Array) -> Any:
    """Apply `function`, which decomposes or inverts every matrix of a stack, to the stack.

    On processors, JAX hands out the matrices of a stack to the threads of a pool, on one of which
    it waits for the others: as many stacks at a time as there are threads, keys and values on two
    cores, would wait for ever. One matrix at a time does not wait.
    """
    xp = compat.array_namespace(stack)
    alone = compat.is_jax_namespace(xp) and on_cpu(stack)
    return map_blocks(function, 1 if alone else max(1, stack.shape[0]), stack)


def eigh(stack: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of every symmetric matrix ``[matrices, n, n]``, ascending.

    PyTorch computes in float64: on matrices of rounding errors, which constant keys leave, its
    single-precision solver does not converge.
    """
    xp = compat.array_namespace(stack)
    wide = xp.astype(stack, xp.float64) if compat.is_torch_namespace(xp) else stack
    values, vectors = map_matrices(lambda matrices: tuple(xp.linalg.eigh(matrices)), wide)
    return xp.astype(values, stack.dtype, copy=False), xp.astype(vectors, stack.dtype, copy=False)


def on_cpu(x: Array) -> bool:
    """Tell whether a processor with caches computes on `x`, not a GPU or the like."""
    if compat.is_jax_array(x):
        jax = sys.modules["jax"]
        platform = x.device.platform if is_concrete(x) else jax.default_backend()
        return bool(platform == "cpu")
    return not compat.is_cupy_array(x) and getattr(device(x), "type", "cpu") == "cpu"


def values_at_a_time(x: Array) -> int | None:
    """How many values best go through many steps together; None for all.

    On processors, caches then hold them from step to step. PyTorch takes long to begin a step; JAX
    shares a step among the cores only if there is much of it.
    """
    if not on_cpu(x):
        return None
    return 2**19 if compat.is_jax_array(x) else 2**18 if compat.is_torch_array(x) else 2**16


def extremes(x: Array, axis: int) -> tuple[Array, Array]:
    """Smallest and largest values along an axis, as float32."""
    xp = compat.array_namespace(x)
    if compat.is_numpy_namespace(xp):
        x = astype(x, "float32")  # it compares no other floats as fast
    # Elsewhere, a float32 copy would be written to memory first.
    return astype(xp.min(x, axis=axis), "float32"), astype(xp.max(x, axis=axis), "float32")


def largest_positions(x: Array, count: int) -> Array:
    """Positions of the `count` largest values along the last axis, in any order."""
    xp = compat.array_namespace(x)
    if compat.is_jax_namespace(xp):
        return sys.modules["jax"].lax.top_k(x, count)[1]  # a partition would be a full sort
    if compat.is_torch_namespace(xp):
        return sys.modules["torch"].topk(x, count, sorted=False).indices  # likewise
    size = x.shape[-1]
    return xpx.argpartition(x, size - count, axis=-1)[..., size - count :]


def first_largest(x: Array) -> Array:
    """Position of the largest value along the last axis, the first of equals, as int32."""
    xp = compat.array_namespace(x)
    if compat.is_jax_namespace(xp) and on_cpu(x) and x.shape[-1] <= 2**24:
        # Its own search does not use the vector units; minima of float32 do.
        place, last = xp.arange(x.shape[-1], dtype=xp.float32), x.shape[-1] - 1.0
        place = xp.where(x == xp.max(x, axis=-1, keepdims=True), place, last)
        return xp.astype(xp.min(place, axis=-1), xp.int32)
    return xp.astype(xp.argmax(x, axis=-1), xp.int32)


def look_up(table: Array, index: Array) -> Array:
    """Entries ``table[index]`` along the first axis, at positions within it."""
    xp = compat.array_namespace(table, index)
    if compat.is_jax_namespace(xp):
        return xp.take(table, index, axis=0, mode="clip")  # by default, it would look for others
    taken = xp.take(table, xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(taken, (*index.shape, *table.shape[1:]))


def scatter(x: Array, index: Array, values: Array, *, overwrite: bool = False) -> Array:
    """Return `x` with the rows ``x[index] = values``; `index` is 1-D, sorted, without repeats.

    With `overwrite`, `x` itself is written where its library can, and must not be used afterwards.
    """
    xp = compat.array_namespace(x)
    if index.shape[0] == 0:
        return x
    if overwrite and _written_in_inference_mode_only(x):
        with sys.modules["torch"].inference_mode():
            x[index] = values
        return x
    if not compat.is_array_api_strict_namespace(xp):
        return xpx.at(x, index).set(values, copy=None if overwrite else True)
    # The standard has no scatter: look every row up among the indices instead.
    row = xp.arange(x.shape[0], dtype=index.dtype)
    slot = xp.clip(xp.searchsorted(index, row), max=index.shape[0] - 1)
    hit = xp.reshape(xp.take(index, slot) == row, (-1, *[1] * (x.ndim - 1)))
    return xp.where(hit, xp.take(values, slot, axis=0), x)


def _written_in_inference_mode_only(x: Array) -> bool:
    """Tell whether `x` is a tensor of PyTorch that came from ``torch.inference_mode``."""
    return compat.is_torch_array(x) and is_concrete(x) and x.is_inference()


def detach(x: Array) -> Array:
    """Return `x` without what autograd knows of it; the values are not copied.

    Only PyTorch records gradients in its arrays.
    """
    return x.detach() if compat.is_torch_array(x) else x
