"""The array libraries the command can run on, and how each is timed."""

from __future__ import annotations

import importlib
import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import click
import numpy as np

from kvcompress.arrays import Array, convert, namespace_of
from kvcompress.cli.console import InputError

T = TypeVar("T")


class Library:
    """An eager array library whose calls return when their work is done; here NumPy."""

    module = "numpy"
    compiles = False

    def __init__(self) -> None:
        try:
            self.xp = namespace_of(importlib.import_module(self.module))
        except ModuleNotFoundError as error:
            raise InputError(
                f"{error.name} is not installed here; install it with: "
                f"python -m pip install {error.name}"
            ) from error

    def array(self, x: np.ndarray[Any, Any]) -> Array:
        """Take `x` over from the host."""
        return convert(x, self.xp)

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return the form of `function` that is fit to be timed."""
        return function

    def memcpy(self, x: Array) -> Callable[[], Any]:
        """Return a function that copies `x`."""
        target = np.empty_like(x)
        return lambda: np.copyto(target, x)

    def peak(self, function: Any, *args: Any) -> int | None:
        """Bytes that a call holds at its peak beyond input and output; None if not known.

        Parameters
        ----------
        function : callable
            What `compile` returned.
        *args
            What to call it with.
        """
        tracemalloc.start()
        try:
            result = function(*args)
            held, peak = tracemalloc.get_traced_memory()
            del result
        finally:
            tracemalloc.stop()
        return peak - held


class _Jax(Library):
    """JAX: compiled, asynchronous; XLA says what a program will hold."""

    module = "jax.numpy"
    compiles = True

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        return _Program(function)

    def memcpy(self, x: Array) -> Callable[[], Any]:
        copy = self.compile(self.xp.copy)
        return lambda: copy(x)

    def peak(self, function: Any, *args: Any) -> int | None:
        memory = function.program.lower(*args).compile().memory_analysis()
        return None if memory is None else int(memory.temp_size_in_bytes)


class _Program:
    """A function compiled by JAX that waits for its result."""

    def __init__(self, function: Callable[..., Any]) -> None:
        import jax

        self.program = jax.jit(function)
        self._wait = jax.block_until_ready

    def __call__(self, *args: Any) -> Any:
        return self._wait(self.program(*args))


class _Torch(Library):
    """PyTorch on the CPU: eager; the memory that a call takes is not known."""

    module = "torch"

    def memcpy(self, x: Array) -> Callable[[], Any]:
        target = self.xp.empty_like(x)
        return lambda: target.copy_(x)

    def peak(self, function: Any, *args: Any) -> int | None:
        return None


LIBRARIES: dict[str, type[Library]] = {"numpy": Library, "jax": _Jax, "torch": _Torch}


def installed() -> list[str]:
    """Names of the libraries that are installed."""
    return [name for name, library in LIBRARIES.items() if find_spec(library.module.split(".")[0])]


library_option = click.option(
    "--library",
    type=click.Choice(list(LIBRARIES)),
    default="numpy",
    show_default=True,
    help="Array library to run on; JAX is compiled.",
)


def median_time(run: Callable[[], T], *, repeat: int, budget: float = math.inf) -> tuple[float, T]:
    """Median seconds of a call, after one to warm up, and its result.

    Parameters
    ----------
    run : callable
    repeat : int
        Calls to time, at least 1.
    budget : float
        Seconds after which no further call is started.
    """
    result = run()
    times: list[float] = []
    while not times or (len(times) < repeat and sum(times) < budget):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result
