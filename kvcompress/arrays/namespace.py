"""Whose array it is: namespaces, dtypes, devices, and whether a compiler traces."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, TypeAlias

import array_api_compat as compat
import numpy as np

from kvcompress.arrays.pytrees import register_pytrees
from kvcompress.errors import DTypeError, NamespaceError

Array: TypeAlias = Any


Namespace: TypeAlias = Any


FLOATING = ("float16", "bfloat16", "float32")
"""Names of the dtypes that keys and values may have."""

FLOAT16_MAX = 65504.0
"""The largest float16."""


_ITEMSIZE = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}


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


def check_array(name: str, x: Array) -> None:
    """Check that `x` holds plain numbers in memory, and not only looks like an array.

    Raises
    ------
    NamespaceError
        Of a masked array or a matrix of NumPy; of a tensor of PyTorch that is sparse, nested,
        without memory ("meta"), or batched by ``torch.vmap``; of a deleted array of JAX.
    """
    if type(x) is np.ndarray:
        return
    found = None
    if isinstance(x, np.ma.MaskedArray | np.matrix):
        found = f"a {type(x).__name__}; pass a numpy.ndarray, such as x.filled(0) of a masked one"
    elif compat.is_torch_array(x):
        torch = sys.modules["torch"]
        if x.layout is not torch.strided or x.is_nested:
            found = f"a tensor of layout {x.layout}; pass a dense one, such as x.to_dense()"
        elif x.is_meta:
            found = "a tensor on the device meta, which has no numbers"
        elif torch._C._functorch.is_batchedtensor(x):
            found = "a tensor that torch.vmap batches; pass the batch as a dimension instead"
    elif compat.is_jax_array(x) and is_concrete(x) and x.is_deleted():
        found = "an array of JAX that was deleted, or donated to a compiled function"
    if found:
        raise NamespaceError(f"{name} is {found}")


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
        fake = sys.modules.get("torch._subclasses.fake_tensor")
        if fake is not None and isinstance(x, fake.FakeTensor):
            return False
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
        return ml_dtypes_bfloat16()
    try:
        return getattr(xp, name)
    except AttributeError:
        raise DTypeError(f"{library_name(xp)} has no dtype {name}") from None


@cache
def ml_dtypes_bfloat16() -> Any:
    """Return the NumPy dtype of bfloat16."""
    try:
        import ml_dtypes
    except ImportError:
        raise DTypeError("bfloat16 on NumPy needs the package ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def astype(x: Array, name: str) -> Array:
    """Cast `x` to the dtype called `name`; no copy where it has it already."""
    xp = compat.array_namespace(x)
    return xp.astype(x, dtype_of(xp, name), copy=False)
