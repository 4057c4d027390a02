from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulation import EmulatedRuntime, Kernels, build
from kvcompress_cupy import sources
from kvcompress_cupy.operations import Operations

if shutil.which("g++") is None:
    collect_ignore_glob = ["test_*.py"]


class EmulatedBackend(Operations):
    """The CuPy backend, on NumPy arrays and the emulator."""

    name = "emulated"

    def __init__(self, kernels: Callable[[str], Kernels]) -> None:
        self.runtime = EmulatedRuntime(kernels)
        super().__init__(self.runtime)

    def available(self) -> bool:
        return True


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> dict[str, Kernels]:
    """All kernels, compiled for the emulator."""
    directory = tmp_path_factory.mktemp("kernels")
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda family: build(family, directory), sources.FAMILIES)
        return dict(zip(sources.FAMILIES, built, strict=True))


@pytest.fixture
def backend(kernels) -> EmulatedBackend:
    return EmulatedBackend(kernels.__getitem__)
