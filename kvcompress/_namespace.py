"""The one place that asks "whose array?": namespaces, dtypes, devices, tracing, transfer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from typing import Any, TypeAlias, TypeVar

import array_api_compat as compat
import array_api_extra as xpx
import numpy as np

from kvcompress.errors import DTypeError, NamespaceError

Array: TypeAlias = Any
Namespace: TypeAlias = Any

FLOATING = ("float16", "bfloat16", "float32")
_ITEMSIZE = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}

_T = TypeVar("_T", bound=type)
_pytrees: list[tuple[type, tuple[str, ...], tuple[str, ...]]] = []
_registration = Lock()


def array_namespace(*arrays: Array) -> Namespace:
    """Return the Array API namespace that all `arrays` share.

    Raises
    ------
    NamespaceError
        If an argument is no array of a supported library, or libraries are mixed.
    """
    if {type(a) for a in arrays} == {np.ndarray}:
        return _numpy()  # soon, for a single token is compressed in microseconds
    try:
        if not all(map(compat.is_array_api_obj, arrays)):
            raise TypeError  # a Python scalar would pass for an array of any library
        xp = compat.array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(f"{type(a).__module__}.{type(a).__qualname__}" for a in arrays)
        raise NamespaceError(
            f"expected arrays of one library (NumPy, CuPy, JAX, PyTorch, array-api-strict), "
            f"got {kinds}"
        ) from error
    if compat.is_jax_namespace(xp):
        register_pytrees()
    return xp


@cache
def _numpy() -> Namespace:
    return compat.array_namespace(np.empty(0))


def namespace_of(module: Any) -> Namespace:
    """Return the Array API namespace behind a library's module (``numpy``, ``torch``, ...)."""
    try:
        return array_namespace(module.asarray([0.0]))
    except (AttributeError, TypeError) as error:
        raise NamespaceError(
            f"expected an array library such as numpy, jax.numpy, torch or cupy, got {module!r}"
        ) from error


def library_name(xp: Namespace) -> str:
    """Name a namespace the way its users do: ``numpy``, ``jax.numpy``, ``torch``, ..."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def device(x: Array) -> Any:
    """Return the device of `x` (None while JAX traces it)."""
    return compat.device(x) if is_concrete(x) else None


def is_concrete(x: Array) -> bool:
    """Tell whether the values of `x` can be looked at, i.e. no compiler is tracing it."""
    if compat.is_jax_array(x):
        return not isinstance(x, sys.modules["jax"].core.Tracer)
    if compat.is_torch_array(x):
        return not sys.modules["torch"].compiler.is_compiling()
    return True


def dtype_name(dtype: Any) -> str:
    """Name a dtype independently of its library: ``float16``, ``bfloat16``, ``uint8``, ..."""
    return _numpy_name(dtype) if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2]


@cache  # NumPy takes microseconds to name a dtype
def _numpy_name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


def itemsize(name: str) -> int:
    """Bytes of one element of the dtype called `name`."""
    return _ITEMSIZE[name]


def dtype_of(xp: Namespace, name: str) -> Any:
    """Return the dtype of `xp` called `name`.

    Raises
    ------
    DTypeError
        If the library has no such dtype.
    """
    if name == "bfloat16" and (compat.is_numpy_namespace(xp) or compat.is_cupy_namespace(xp)):
        return _ml_dtypes_bfloat16()
    try:
        return getattr(xp, name)
    except AttributeError:
        raise DTypeError(f"{library_name(xp)} has no dtype {name}") from None


@cache
def _ml_dtypes_bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise DTypeError("bfloat16 on NumPy needs the package ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def astype(x: Array, name: str) -> Array:
    """Cast `x` to the dtype called `name`; no copy where it has it already."""
    xp = compat.array_namespace(x)
    return xp.astype(x, dtype_of(xp, name), copy=False)


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
    cores, would wait for ever. One matrix at a time waits for nobody.
    """
    xp = compat.array_namespace(stack)
    alone = compat.is_jax_namespace(xp) and on_cpu(stack)
    return map_blocks(function, 1 if alone else max(1, stack.shape[0]), stack)


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


def largest(x: Array, count: int) -> Array:
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
    if compat.is_jax_namespace(xp) and on_cpu(x):
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
    if not compat.is_array_api_strict_namespace(xp):
        return xpx.at(x, index).set(values, copy=None if overwrite else True)
    # The standard has no scatter: look every row up among the indices instead.
    row = xp.arange(x.shape[0], dtype=index.dtype)
    slot = xp.clip(xp.searchsorted(index, row), max=index.shape[0] - 1)
    hit = xp.reshape(xp.take(index, slot) == row, (-1, *[1] * (x.ndim - 1)))
    return xp.where(hit, xp.take(values, slot, axis=0), x)


def convert(x: Array, xp: Namespace, device: Any = None) -> Array:
    """Move `x` to the namespace `xp` and `device`, by DLPack where both sides can."""
    source = compat.array_namespace(x)
    if source is not xp:
        x = _import(x, source, xp)
    return x if device is None else compat.to_device(x, device)


def _import(x: Array, source: Namespace, xp: Namespace) -> Array:
    dtype_of(xp, dtype_name(x.dtype))
    if compat.is_numpy_namespace(source):
        x = np.ascontiguousarray(x)  # negative strides abort PyTorch
    try:
        return xp.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        return _from_host(to_host(x), xp)


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """Copy or view `x` as a NumPy array (bfloat16 as that of ml_dtypes)."""
    if compat.is_torch_array(x):
        x = x.detach().cpu()
        if dtype_name(x.dtype) == "bfloat16":
            bits = np.asarray(x.view(sys.modules["torch"].int16))
            return bits.view(_ml_dtypes_bfloat16())
    elif compat.is_cupy_array(x):
        x = x.get()
    return np.asarray(x)


def _from_host(x: np.ndarray[Any, Any], xp: Namespace) -> Array:
    if compat.is_torch_namespace(xp):
        x = np.array(x, copy=True)  # torch rejects read-only memory
        if dtype_name(x.dtype) == "bfloat16":
            return xp.asarray(x.view(np.int16)).view(xp.bfloat16)
    return xp.asarray(x)


def pytree(*, data: Sequence[str], meta: Sequence[str]) -> Callable[[_T], _T]:
    """Mark a frozen dataclass as a JAX pytree, registered once JAX is in use."""

    def mark(cls: _T) -> _T:
        _pytrees.append((cls, tuple(data), tuple(meta)))
        return cls

    return mark


def register_pytrees() -> None:
    """Register the marked containers with JAX, if the program has imported it."""
    if _pytrees and "jax" in sys.modules:
        tree_util = sys.modules["jax"].tree_util
        with _registration:
            while _pytrees:
                cls, data, meta = _pytrees[-1]
                tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)
                _pytrees.pop()  # last: an empty list tells other threads that all is registered
