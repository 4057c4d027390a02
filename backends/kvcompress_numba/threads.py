"""Kernels on all processors: the work is cut into runs of units, which threads take in turn.

One that is kept from running, as by the threads of a BLAS that wait busily, leaves more to others.
Numba's own threads are not used: its default pool must not be entered from two threads at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numba import config, njit
from numba.core.registry import cpu_target

WORTH_A_THREAD = 2**15
"""Values that a thread must get, or waking it takes longer than it saves."""

PARTS = 4
"""Runs of units for every thread."""


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function that does units ``start`` to ``stop``, its last two arguments.

    Before them it gets `scratch`; it can allocate nothing, nor count references, which would
    keep inner loops from running through. So arrays come as arguments, however many, because a
    container of them would be counted; and one loop over all stages keeps a row in the cache.
    """
    compiled: Callable[..., None] = njit(nogil=True, cache=True, error_model="numpy", _nrt=False)(
        function
    )
    return compiled


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of kernels."""
    compiled: Callable[..., Any] = njit(error_model="numpy", _nrt=False, forceinline=True)(function)
    return compiled


def run(function: Callable[..., None], units: int, values: int, scratch: int, *args: Any) -> None:
    """Call a kernel for `units` units of `values` values, which do not touch each other's.

    Every thread gets `scratch` float32 numbers to work with.
    """
    if units == 0 or values == 0:
        return
    threads = config.NUMBA_NUM_THREADS
    parts = min(units, units * values // WORTH_A_THREAD, PARTS * threads)
    if min(threads, parts) <= 1:
        function(*args, np.empty(scratch, np.float32), 0, units)
        return
    todo = deque(pairwise(units * i // parts for i in range(parts + 1)))

    def work() -> None:
        own = np.empty(scratch, np.float32)
        with suppress(IndexError):
            while True:
                function(*args, own, *todo.popleft())

    others = [_pool().submit(work) for _ in range(1, min(threads, parts))]
    work()
    for other in others:
        if not other.cancel():
            other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, config.NUMBA_NUM_THREADS - 1), "kvcompress")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of the threads


def has_half_floats() -> bool:
    """Tell whether the processor that Numba compiles for converts float16 by itself."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return not triple.startswith(("x86_64", "i686")) or "+f16c" in features
