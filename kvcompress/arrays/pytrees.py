"""Containers as JAX pytrees, registered once JAX is in use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TypeVar

_T = TypeVar("_T", bound=type)


_pytrees: list[tuple[type, tuple[str, ...], tuple[str, ...]]] = []


_registration = Lock()


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
