"""Constants of the host as arrays of a library, kept for the process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar

import array_api_compat as compat

from kvcompress.arrays.namespace import Array, Namespace, array_namespace, device, is_concrete

T = TypeVar("T")


def kept(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function that makes arrays out of constants of the host: what it makes is kept.

    The function takes hashable constants, a namespace and a device; the decorated one takes the
    constants and an array `like` that tells the other two. What is kept was made outside of any
    trace of JAX and inference mode of PyTorch, so that it is of use later. While a compiler traces,
    or a mode of PyTorch replaces tensors by others (fake ones, for example), nothing is kept.

    Parameters
    ----------
    maxsize : int
        Results kept, the latest used.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        held = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*constants: Any, like: Array) -> T:
            xp, where = array_namespace(like), device(like)
            if not is_concrete(like) or _replaces_tensors(xp):
                return make(*constants, xp, where)
            with _eager(xp):
                return held(*constants, xp, where)

        return get

    return decorate


def _replaces_tensors(xp: Namespace) -> bool:
    if not compat.is_torch_namespace(xp):
        return False
    dispatch = sys.modules["torch.utils._python_dispatch"]
    return dispatch._get_current_dispatch_mode() is not None


def _eager(xp: Namespace) -> AbstractContextManager[Any]:
    """Leave the trace or the inference mode of the caller."""
    if compat.is_jax_namespace(xp):
        context: AbstractContextManager[Any] = sys.modules["jax"].ensure_compile_time_eval()
        return context
    if compat.is_torch_namespace(xp):
        mode: AbstractContextManager[Any] = sys.modules["torch"].inference_mode(False)
        return mode
    return nullcontext()
