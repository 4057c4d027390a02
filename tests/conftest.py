"""The `xp` fixture: every test that takes it runs on every array library that is here.

``--library NAME`` (repeatable) limits the libraries; one named must be importable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

collect_ignore = ["backends/kernels"]  # of the CUDA sources: nox -s kernels

LIBRARIES = {
    "numpy": ("numpy", "numpy-readonly"),
    "strict": ("strict",),
    "jax": ("jax-jit",),
    "jax-eager": ("jax",),
    "torch": ("torch",),
    "cupy": ("cupy",),
}
MODULES = {"strict": "array_api_strict", "jax": "jax.numpy", "jax-eager": "jax.numpy"}

hypothesis.settings.register_profile("dev", deadline=None, max_examples=30)
# "few" is for JAX, which compiles every operation for every shape that is drawn.
for name, examples in {"ci": 30, "few": 5}.items():
    hypothesis.settings.register_profile(
        name,
        deadline=None,
        max_examples=examples,
        derandomize=True,
        print_blob=True,
        database=None,
    )
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@dataclass(frozen=True)
class Library:
    """An array library as the tests use it.

    Attributes
    ----------
    name : str
        "numpy", "numpy-readonly", "strict", "jax", "jax-jit", "torch" or "cupy".
    module : module
        What its users import: numpy, jax.numpy, torch, ...
    """

    name: str
    module: Any

    def __str__(self) -> str:
        return self.name

    @property
    def is_jax(self) -> bool:
        return self.name.startswith("jax")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of keys and values that the library has; see `few`."""
        if self.name == "strict":
            return ("float32",)
        return self.few(("float32", "bfloat16", "float16"))

    def few(self, cases: Sequence[Any]) -> Any:
        """Fewer cases where each costs seconds: eager JAX compiles every operation by itself."""
        return cases[:2] if self.name == "jax" else cases

    def asarray(self, x: np.ndarray) -> Any:
        """Copy a NumPy array (bfloat16 as that of ml_dtypes) into the library."""
        x = np.array(x)
        if self.name == "torch":
            if x.dtype.name == "bfloat16":
                return self.module.asarray(x.view(np.int16)).view(self.module.bfloat16)
            return self.module.asarray(x)
        if self.name.startswith("numpy"):
            x.flags.writeable = self.name == "numpy"
            return x
        return self.module.asarray(x)

    def numpy(self, x: Any) -> np.ndarray:
        """Copy an array of the library to NumPy, bit for bit."""
        if self.name == "torch":
            if x.dtype == self.module.bfloat16:
                return x.view(self.module.int16).numpy().view(bfloat16).copy()
            return x.numpy().copy()
        return x.get() if self.name == "cupy" else np.array(x)

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of the library."""
        return type(x) is type(self.asarray(np.zeros(1, "float32")))

    def run(self, function: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
        """Call `function`; "jax-jit" compiles it first, keywords being static."""
        if self.name == "jax-jit":
            return _jit(function, tuple(sorted(static.items(), key=lambda item: item[0])))(*arrays)
        return function(*arrays, **static)


@cache
def _jit(function: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return import_module("jax").jit(partial(function, **dict(static)))


bfloat16 = np.dtype(import_module("ml_dtypes").bfloat16)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--library",
        action="append",
        choices=list(LIBRARIES),
        help="array library to test with (repeatable); default: all that are here",
    )
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/golden/ anew from the oracle"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "library(name): for that array library alone")


@cache
def _load(name: str) -> Any:
    """The library's module; None where it is not here (CuPy without a GPU is not)."""
    try:
        module = import_module(MODULES.get(name, name))
    except ImportError:
        return None
    return None if name == "cupy" and not module.is_available() else module


def selected(config: pytest.Config) -> list[str]:
    named = config.getoption("--library")
    for name in named or ():
        if _load(name) is None:
            raise pytest.UsageError(f"--library {name}: {name} cannot be used here")
    return list(dict.fromkeys(named)) if named else [name for name in LIBRARIES if _load(name)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "xp" in metafunc.fixturenames:
        chosen = [
            Library(variant, _load(name))
            for name in selected(metafunc.config)
            for variant in LIBRARIES[name]
        ]
        metafunc.parametrize("xp", chosen, ids=str, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = selected(config)
    for item in items:
        for mark in item.iter_markers("library"):
            if mark.args[0] not in here:
                item.add_marker(pytest.mark.skip(reason=f"not testing with {mark.args[0]}"))


@pytest.fixture
def tables() -> Any:
    """The module ``docs/tables.py``."""
    script = Path(__file__).parent.parent / "docs" / "tables.py"
    if not script.exists():
        pytest.skip("the documentation is not beside the tests")
    spec = spec_from_file_location("tables", script)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
