"""Builds the CUDA kernels with g++ for the emulator and runs them on NumPy arrays."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from kvcompress_cupy import sources
from kvcompress_cupy.launches.layout import SHARED, Launch

from kvcompress.arrays import dtype_of, namespace_of

HERE = Path(__file__).parent
FLAGS = (
    *("-x", "c++", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"),
)


GRID, BLOCK, ARGUMENTS = 2**31 - 1, 1024, 4096
"""Most blocks, threads of a block and bytes of arguments that CUDA launches."""


class EmulationError(AssertionError):
    """A kernel did what a GPU forbids or leaves undefined."""


def build(
    family: str,
    directory: Path,
    *,
    names: tuple[str, ...] = (),
    mutate: Callable[[str], str] = str,
    optimize: bool = True,
) -> Kernels:
    """Compile the instantiations of a kernel, all or only `names`.

    Parameters
    ----------
    mutate : callable
        Changes the source first.
    """
    names = names or sources.names(family)
    rows = ",\n".join(f'    emulation::kernel<&{name}>("{name}")' for name in names)
    text = (
        f'#include "{HERE}/emulation.hpp"\n#line 1 "{family}.cu"\n'
        f"{mutate(sources.source(family))}\n"
        f"static const emulation::Kernel kernels[] = {{\n{rows}}};\nKV_EXPORT\n"
    )
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / f"{family}.cpp"
    source.write_text(text)
    library = source.with_suffix(".so")
    level = ("-O2", "-Werror") if optimize else ("-O1", "-w")
    subprocess.run(["g++", *FLAGS, *level, str(source), "-o", str(library)], check=True)
    return Kernels(names, ctypes.CDLL(str(library)))


class Kernels:
    """A compiled family."""

    def __init__(self, names: tuple[str, ...], library: ctypes.CDLL) -> None:
        self._index = {name: i for i, name in enumerate(names)}
        self._launch = library.kv_launch
        self._launch.restype = ctypes.c_char_p
        self._argument_size = library.kv_argument_size
        self._argument_size.restype = ctypes.c_size_t

    def __call__(
        self,
        launch: Launch,
        *arrays: np.ndarray | None,
        reached: Sequence[np.ndarray] = (),
        seed: int,
        writable: int,
        first: int = 0,
        flush: bool = False,
    ) -> None:
        """Run the blocks from `first` on; the last `writable` arrays are outputs."""
        index = self._index[launch.name]
        check_launch(launch)
        values = [np.uint64(_pointer(a)) for a in arrays] + list(launch.scalars)
        sizes = [self._argument_size(ctypes.c_uint(index), ctypes.c_size_t(i)) for i in range(99)]
        given = [value.nbytes for value in values]
        if sizes[: len(given) + 1] != [*given, 0]:
            raise EmulationError(f"{launch.name} takes arguments of other sizes than {given}")
        buffers = [np.array(value) for value in values]
        pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        ranges = []
        for i, array in enumerate((*reached, *arrays)):
            if array is None:
                continue
            start, stop = np.lib.array_utils.byte_bounds(array)
            ranges += [start, stop, int(i >= len(reached) + len(arrays) - writable)]
        error = self._launch(
            ctypes.c_uint(index),
            ctypes.c_uint(first),
            ctypes.c_uint(launch.grid),
            ctypes.c_uint(launch.block),
            ctypes.c_size_t(launch.shared),
            pointers,
            (ctypes.c_size_t * len(ranges))(*ranges),
            ctypes.c_size_t(len(ranges) // 3),
            ctypes.c_uint64(seed),
            ctypes.c_bool(flush),
        )
        if error is not None:
            raise EmulationError(f"{launch.name}: {error.decode()}")


def check_launch(launch: Launch) -> None:
    """Raise where CUDA would not launch, or CuPy pass other arguments than are meant."""
    for scalar in launch.scalars:
        # CuPy refuses larger arrays of the host, and takes Python's numbers for those of 64 bits.
        by_value = isinstance(scalar, np.generic | np.ndarray) and scalar.size == 1
        if not by_value:
            raise EmulationError(f"{launch.name}: {scalar!r} cannot be passed by value")
    for what, value, most in (
        ("blocks", launch.grid, GRID),
        ("threads", launch.block, BLOCK),
        ("bytes of shared memory", launch.shared, SHARED),
        ("bytes of arguments", sum(scalar.nbytes for scalar in launch.scalars), ARGUMENTS),
    ):
        # CuPy would launch one block or thread for none.
        least = what in ("blocks", "threads")
        if type(value) is not int or not least <= value <= most:
            raise EmulationError(f"{launch.name}: {value!r} {what}, at most {most}")


class EmulatedRuntime:
    """`Runtime` of the operations: NumPy arrays, emulated kernels.

    Attributes
    ----------
    launches : list of Launch
        All that were run.
    copies : int
        How often an array had to be copied.
    flush : bool
        Whether kernels take denormal numbers for zero.
    """

    def __init__(self, kernels: Callable[[str], Kernels]) -> None:
        self._kernels = kernels
        self._outputs: list[np.ndarray] = []
        self._launched = False
        self.launches: list[Launch] = []
        self.copies = 0
        self.flush = False

    def pointer(self, x: np.ndarray) -> int:
        return _pointer(x)

    def empty(self, shape: tuple[int, ...], dtype: str, like: np.ndarray) -> np.ndarray:
        if self._launched:  # the next operation
            self._outputs, self._launched = [], False
        kind = np.dtype(dtype_of(namespace_of(np), dtype))
        size = int(np.prod(shape)) * kind.itemsize
        # Aligned as CuPy aligns, full of junk.
        buffer = np.full(size + 512, 0xA5, "uint8")
        start = -_pointer(buffer) % 512
        out = buffer[start : start + size].view(kind).reshape(shape)
        self._outputs.append(out)
        return out

    def true(self, like: np.ndarray) -> np.ndarray:
        out = self.empty((), "bool", like)
        out[...] = True
        return out

    def contiguous(self, x: np.ndarray) -> np.ndarray:
        self.copies += 1
        return np.ascontiguousarray(x)

    def launch(
        self,
        launch: Launch,
        *arrays: np.ndarray | None,
        reached: Sequence[np.ndarray] = (),
        changed: Sequence[np.ndarray] = (),
    ) -> None:
        self.launches.append(launch)
        self._launched = True
        outputs = [any(array is output for output in self._outputs) for array in arrays]
        outputs += [True] * len(changed)
        arrays = *arrays, *changed
        if outputs != sorted(outputs):
            raise EmulationError("outputs come last")
        kernels = self._kernels(launch.family)
        seed, writable = len(self.launches), sum(outputs)
        kernels(launch, *arrays, reached=reached, seed=seed, writable=writable, flush=self.flush)


def _pointer(x: np.ndarray | None) -> int:
    return 0 if x is None else int(x.__array_interface__["data"][0])
