"""``kvcompress doctor``: what is installed here, and which backends are in use."""

from __future__ import annotations

import itertools
import os
import platform
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

import kvcompress
from kvcompress import backend
from kvcompress.arrays import FLOATING, dtype_of, namespace_of
from kvcompress.cli.console import stdout
from kvcompress.cli.presets import presets, settings
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.errors import BackendError

CORE = ("numpy", "array-api-compat", "array-api-extra")

# CuPy comes as one distribution per CUDA version.
LIBRARIES = {
    "NumPy": ("numpy",),
    "JAX": ("jax",),
    "PyTorch": ("torch",),
    "CuPy": ("cupy-cuda12x", "cupy-cuda13x", "cupy"),
    "Numba": ("numba",),
    "array-api-strict": ("array-api-strict",),
}


@click.command()
@click.option("--warm", is_flag=True, help="Compile the kernels, and tell how long it takes.")
def doctor(warm: bool) -> None:
    """Show versions, bfloat16 support, and the backends found and in use.

    \b
    Examples:
      KVCOMPRESS_BACKEND=generic kvcompress doctor
      kvcompress doctor --warm
    """  # noqa: D301 (click keeps the lines after \b)
    console = stdout()
    console.print(
        f"kvcompress {kvcompress.__version__}, "
        f"Python {platform.python_version()} on {platform.platform()}"
    )
    console.print(", ".join(f"{name} {_version(name) or 'missing'}" for name in CORE[1:]))
    console.print(_libraries())
    console.print(_backends())
    setting = os.environ.get(backend.ENVIRONMENT)
    console.print(f"{backend.ENVIRONMENT}: {setting or 'not set, so auto'}")
    console.print(f"in use: {_in_use()}")
    if warm:
        console.print(_warm())


def _libraries() -> Table:
    table = Table("array library", "version", "bfloat16", box=SIMPLE_HEAD)
    for name, distributions in LIBRARIES.items():
        found = next(filter(None, map(_version, distributions)), None)
        table.add_row(name, found or "not installed", _bfloat16(name) if found else "")
    return table


def _bfloat16(library: str) -> str:
    if library == "Numba":
        return ""
    if library == "array-api-strict":
        return "no"
    if library in ("NumPy", "CuPy"):
        return "yes" if find_spec("ml_dtypes") else "no: needs the package ml_dtypes"
    return "yes"


def _backends() -> Table:
    table = Table("backend", "state", box=SIMPLE_HEAD)
    table.add_row("generic", "always there")
    for name, state in _states():
        table.add_row(name, state)
    return table


def _states() -> Iterator[tuple[str, str]]:
    for name in backend.names():
        try:
            yield name, "available" if backend.load(name).available() else "not available here"
        except Exception as error:  # whatever a backend's import may raise
            yield name, f"failed to load: {error}"


def _in_use() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it already
        try:
            chosen = backend.select().backends
        except BackendError as error:
            return f"none: {error}"
    return ", ".join([*(b.name for b in chosen), "generic"])


def _warm() -> Table:
    """Time the first and the second call of every method on NumPy arrays of a few tokens."""
    table = Table("first and second call", "dtype", "first", "second", box=SIMPLE_HEAD)
    for (name, (method, *_)), dtype in itertools.product(presets([64]).items(), FLOATING):
        compressor = KVCacheCompressor(method)
        k = np.ones((1, 2, 64, 64), dtype_of(namespace_of(np), dtype))
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            compressor.decompress_kv(compressor.compress_kv(k, k))
            seconds.append(time.perf_counter() - start)
        first, second = seconds
        table.add_row(f"{name}({settings(method)})", dtype, f"{first:.2f} s", f"{second:.4f} s")
    return table


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
