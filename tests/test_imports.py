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


def test_modules_and_packages_stand_on_floors():
    """Some order has every one import only from those before it."""
    root = Path(kvcompress.__file__).parent
    rooms = {path.stem for path in root.iterdir() if path.suffix in ("", ".py")} - {"__init__"}
    below = {room: set() for room in rooms}
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            parts = [name.split(".") for name in names]
            found = {p[1] for p in parts if p[0] == "kvcompress" and len(p) > 1} & rooms
            below.setdefault(room, set()).update(found - {room})
    order = list(TopologicalSorter(below).static_order())
    assert order.index("errors") < order.index("ops") < order.index("compressor")
