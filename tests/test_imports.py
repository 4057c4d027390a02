from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvcompress

ARRAY_LIBRARIES = {
    "array_api_strict",
    "cupy",
    "dask",
    "jax",
    "ml_dtypes",
    "numba",
    "sparse",
    "tensorflow",
    "torch",
}


def modules_after(program):
    """Top-level modules a fresh interpreter holds after running `program`."""
    program += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "import kvcompress",
        "import kvcompress.ops, kvcompress.methods, kvcompress.backend",
        "import numpy, kvcompress as c; x = numpy.ones((1, 1, 4, 4), 'f4'); "
        "z = c.KVCacheCompressor(c.Hybrid(2), backend='generic'); "
        "z.decompress_kv(z.compress_kv(x, x))",
        "import kvcompress.testing.conformance",
        "import kvcompress_numba, kvcompress_torch",
        "from kvcompress.backend import names, load; [load(n) for n in names()]",
    ],
)
def test_imports_no_array_library_but_numpy(program):
    modules = modules_after(program)
    assert "numpy" in modules
    assert "kvcompress" in modules
    assert not modules & ARRAY_LIBRARIES


def test_the_probe_sees_what_is_imported():
    assert "array_api_strict" in modules_after("import kvcompress, array_api_strict")


def test_every_public_name_is_there():
    assert sorted(kvcompress.__all__) == kvcompress.__all__
    assert all(hasattr(kvcompress, name) for name in kvcompress.__all__)


ROOMS = (
    *("errors", "arrays", "ops", "rope", "files", "backend", "entropy", "calibration", "methods"),
    *("cross_layer", "compressed", "compressor", "caches", "plan", "integrations", "evaluation"),
    *("testing", "cli"),
)
"""Each imports only from those before it; see docs/architecture.md."""

BACKENDS_MAY = {"errors", "arrays", "ops", "backend"}


def imported(path):
    """Dotted names that a module imports from kvcompress, wherever in the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
        yield from (name.split(".") for name in names if name.startswith("kvcompress."))


def test_rooms_import_only_from_rooms_before_them():
    root = Path(kvcompress.__file__).parent
    found = {path.stem for path in root.iterdir() if path.suffix in ("", ".py")}
    assert found - {"__init__", "__main__", "__pycache__", "data", "py"} == set(ROOMS)
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room in ROOMS:
            floor = ROOMS.index(room)
            for parts in imported(path):
                assert ROOMS.index(parts[1]) <= floor, (path, ".".join(parts))


def test_modules_of_a_room_import_in_no_circle():
    root = Path(kvcompress.__file__).parent
    below = {}
    for path in root.rglob("*.py"):
        name = ".".join(("kvcompress", *path.relative_to(root).with_suffix("").parts))
        below[name.removesuffix(".__init__")] = {".".join(parts) for parts in imported(path)}
    for name, names in below.items():
        known = {n if n in below else n.rpartition(".")[0] for n in names}
        # A package's list of names is not what its modules are built on.
        below[name] = {n for n in known & set(below) if not name.startswith(f"{n}.")} - {name}
    TopologicalSorter(below).prepare()  # raises CycleError


def test_backends_import_little():
    backends = Path(kvcompress.__file__).parent.parent / "backends"
    for path in backends.rglob("*.py"):  # none where the wheel is installed
        for parts in imported(path):
            assert parts[1] in BACKENDS_MAY, (path, ".".join(parts))
