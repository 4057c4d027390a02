from __future__ import annotations

import subprocess
import sys

import pytest

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
    import kvcompress

    assert sorted(kvcompress.__all__) == kvcompress.__all__
    assert all(hasattr(kvcompress, name) for name in kvcompress.__all__)
