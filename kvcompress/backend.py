"""Who runs an operation: a backend's kernel where there is one, the generic form otherwise.

An operation is a function of `kvcompress.ops.OPERATIONS`: arrays positional, everything static by
keyword. A backend is an object with a method of the same name and signature for every operation it
speeds up. A kernel that reads a paged cache in place is a method ``<operation>_paged``, which takes
pool and slots (see `kvcompress.ops.slots`) for the first array.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar, runtime_checkable

from kvcompress.arrays import Array
from kvcompress.errors import BackendError, BackendWarning
from kvcompress.ops.slots import Paged, gather_slots

BUILTIN: Mapping[str, str] = {
    "cupy": "kvcompress_cupy",
    "numba": "kvcompress_numba",
    "torch": "kvcompress_torch",
}
"""Import packages of our own backends; each holds an object ``backend``."""

ENTRY_POINTS = "kvcompress.backends"
"""Entry-point group under which other distributions register theirs."""

ENVIRONMENT = "KVCOMPRESS_BACKEND"
"""Environment variable that chooses where no argument does."""

Method = TypeVar("Method", bound=Callable[..., Any])


@runtime_checkable
class Backend(Protocol):
    """What a backend provides, besides one method for every operation it speeds up."""

    name: str

    def available(self) -> bool:
        """Tell whether the backend can run here (library, driver, device)."""

    def supports(self, op: str, *arrays: Array, **static: Any) -> bool:
        """Tell whether this call, given its libraries, dtypes and devices, is one for it.

        Called only for operations the backend has a method for; must not look at values.
        """


def takes(predicate: Callable[..., Any]) -> Callable[[Method], Method]:
    """Say which calls a method of a `KernelBackend` takes: those for which `predicate` is true.

    It is given the arrays, all of which are usable, and the keyword arguments of the method.
    """

    def mark(method: Method) -> Method:
        setattr(method, "takes", predicate)  # noqa: B010 (functions have no such attribute)
        return method

    return mark


class KernelBackend:
    """Base of our own backends: a method says by `takes` which calls it takes, or takes all."""

    name: str

    def usable(self, *arrays: Array) -> bool:
        """Tell whether the arrays, of whatever operation, are such as the kernels can read."""
        return True

    def predicate(self, op: str) -> Callable[..., Any]:
        """Return what tells whether the method called `op` takes a call with usable arrays."""
        return getattr(getattr(type(self), op, None), "takes", lambda *_, **__: True)

    def supports(self, op: str, *arrays: Array, **static: Any) -> bool:
        """See `Backend`."""
        return self.usable(*arrays) and bool(self.predicate(op)(*arrays, **static))

    def __reduce__(self) -> tuple[Callable[[str], Backend], tuple[str]]:
        return load, (self.name,)  # pickled by name, as modules are


@dataclass(frozen=True)
class Dispatcher:
    """Runs operations on the first backend that takes them.

    Two are equal, and hash alike, if their backends do; a dispatcher can be pickled if these can.

    Parameters
    ----------
    backends : tuple of Backend
        In the order they are asked; empty for the generic operations alone.
    """

    backends: tuple[Backend, ...] = ()

    def __call__(self, op: Callable[..., Any], *arrays: Array, **static: Any) -> Any:
        """Call `op`, or the method of the same name of a backend that supports the call.

        The first array may be `Paged`: a backend reads it in place, or it is gathered.
        """
        name, (first, *others) = op.__name__, arrays
        if isinstance(first, Paged):
            if self.backend_for(f"{name}_paged", first.pool, first.slots, *others, **static):
                name, arrays = f"{name}_paged", (first.pool, first.slots, *others)
            else:
                arrays = self.array(first), *others
        backend = self.backend_for(name, *arrays, **static)
        return (op if backend is None else getattr(backend, name))(*arrays, **static)

    def array(self, x: Array | Paged) -> Array:
        """Return `x`, or a copy of what it stands for."""
        return self(gather_slots, x.pool, x.slots) if isinstance(x, Paged) else x

    def backend_for(self, op: str, *arrays: Array, **static: Any) -> Backend | None:
        """Return the backend that takes this call; None means the generic operation."""
        for backend in self.backends:
            if hasattr(backend, op) and backend.supports(op, *arrays, **static):
                return backend
        return None


def select(choice: str | Dispatcher | None = None) -> Dispatcher:
    """Choose the backends.

    Parameters
    ----------
    choice : str or Dispatcher, optional
        "auto": every backend available here; "generic": none; a backend's name: that one.
        None asks the environment variable ``KVCOMPRESS_BACKEND``, then means "auto". A dispatcher
        is returned as it is.

    Raises
    ------
    BackendError
        If the backend asked for is unknown, cannot be loaded, or is not available.
    """
    if isinstance(choice, Dispatcher):
        return choice
    name = choice or os.environ.get(ENVIRONMENT) or "auto"
    if name == "generic":
        return Dispatcher()
    if name == "auto":
        return _automatic()
    if name not in names():
        raise BackendError(
            f"unknown backend {name!r}; known here: auto, generic, {', '.join(names())}"
        )
    try:
        backend = load(name)
        available = backend.available()
    except Exception as error:
        raise BackendError(f"backend {name!r} failed to load: {error}") from error
    if not available:
        raise BackendError(f"backend {name!r} is installed but not available on this machine")
    return Dispatcher((backend,))


def names() -> tuple[str, ...]:
    """Names of the backends installed here, our own first."""
    own = [name for name, module in BUILTIN.items() if find_spec(module)]
    return tuple(dict.fromkeys(own + [point.name for point in entry_points(group=ENTRY_POINTS)]))


def load(name: str) -> Backend:
    """Import the backend called `name`, one of `names()`."""
    if name in BUILTIN:
        backend = importlib.import_module(BUILTIN[name]).backend
    else:
        (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
        backend = point.load()
    if not isinstance(backend, Backend):
        raise BackendError(f"{backend!r} is no Backend: it lacks name, available or supports")
    return backend


@cache
def _automatic() -> Dispatcher:
    found = []
    for name in names():
        try:
            backend = load(name)
            if backend.available():
                found.append(backend)
        except Exception as error:
            warnings.warn(
                f"backend {name!r} failed to load and is left out: {error}",
                BackendWarning,
                stacklevel=3,
            )
    return Dispatcher(tuple(found))
