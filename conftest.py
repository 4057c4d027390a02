"""Code blocks of README.md and docs/ are tests: ``pytest README.md docs``.

Python blocks of one document share a namespace and a scratch directory. Of the commands in console
blocks, those of ``kvcompress`` run; the others install or build things. A block for a library that
need not be here is preceded by ``<!--- skip: next if(missing("cupy"), reason="needs a GPU") -->``.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tempfile
from importlib.util import find_spec
from typing import Any

import hypothesis
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

# The first example of a page loads the kernels, which takes longer than Hypothesis allows.
hypothesis.settings.register_profile("docs", deadline=None)
hypothesis.settings.load_profile("docs")


def missing(library: str) -> bool:
    """Whether a library is not installed or, for CuPy, has no device."""
    if find_spec(library) is None:
        return True
    if library == "cupy":
        import cupy

        return not cupy.is_available()
    return False


def run_console(example: Example) -> None:
    for line in example.parsed.splitlines():
        if line.startswith("$ "):
            for command in map(shlex.split, line.removeprefix("$ ").split("&&")):
                if command[0] == "kvcompress":
                    subprocess.run(command, check=True)


def enter(namespace: dict[str, Any]) -> None:
    namespace["missing"] = missing
    namespace["stack"] = stack = contextlib.ExitStack()
    stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))


def leave(namespace: dict[str, Any]) -> None:
    namespace["stack"].close()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("console", run_console), SkipParser()],
    patterns=["*.md"],
    setup=enter,
    teardown=leave,
).pytest()
