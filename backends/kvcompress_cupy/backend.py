"""The operations on CuPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import array_api_compat as compat
import numpy as np

from kvcompress.arrays import Array, dtype_of, namespace_of
from kvcompress_cupy import sources
from kvcompress_cupy.launches.layout import Launch
from kvcompress_cupy.operations import Operations


class CupyRuntime:
    """CuPy arrays; kernels run on the current stream and wait for nothing."""

    def pointer(self, x: Array) -> int:
        """Address on the device."""
        return int(x.data.ptr)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Array:
        """Allocate from CuPy's pool, on the device of `like`."""
        import cupy

        with like.device:  # where the Array API's `device` is ignored
            return cupy.empty(shape, dtype=dtype_of(namespace_of(np), dtype))

    def true(self, like: Array) -> Array:
        """Allocate a boolean without dimensions, and set it."""
        import cupy

        with like.device:
            return cupy.ones((), dtype=bool)

    def contiguous(self, x: Array) -> Array:
        """Return `x` or a copy in C order."""
        import cupy

        with x.device:
            return cupy.ascontiguousarray(x)

    def launch(
        self,
        launch: Launch,
        *arrays: Array | None,
        reached: Sequence[Array] = (),
        changed: Sequence[Array] = (),
    ) -> None:
        """Run a kernel on the current stream of the first array's device."""
        (first, *_) = arrays
        pointers = [_NULL if array is None else array for array in (*arrays, *changed)]
        with first.device:  # type: ignore[union-attr]  # the first is an array
            kernel = _kernel(launch.family, launch.name)
            kernel(
                (launch.grid,),
                (launch.block,),
                (*pointers, *launch.scalars),
                shared_mem=launch.shared,
            )


class CupyBackend(Operations):
    """Kernels for CuPy; a `kvcompress.backend.Backend`."""

    name = "cupy"

    def __init__(self) -> None:
        super().__init__(CupyRuntime())

    def available(self) -> bool:
        """Tell whether there is a CuPy with kernels for bfloat16, and a device."""
        try:
            import cupy
        except ImportError:
            return False
        version = tuple(map(int, cupy.__version__.split(".")[:2]))
        return version >= (14, 2) and bool(cupy.is_available())

    def usable(self, *arrays: Array) -> bool:
        """Tell whether all arrays are CuPy's, on one device, which has bfloat16."""
        return (
            all(map(compat.is_cupy_array, arrays))
            and len({array.device.id for array in arrays}) == 1
            and _has_bfloat16(arrays[0].device.id)
        )


_NULL = np.uint64(0)
_compiling = Lock()


@cache
def _kernel(family: str, name: str) -> Any:
    with _compiling:  # other threads wait instead of compiling the same
        return _module(family).get_function(name)


@cache
def _module(family: str) -> Any:
    import cupy

    return cupy.RawModule(
        code=sources.source(family),
        options=sources.OPTIONS,
        name_expressions=sources.names(family),
    )


@cache
def _has_bfloat16(device: int) -> bool:
    """Whether a device converts to bfloat16, as all have done since compute capability 8.0."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability) >= 80
