"""Compiles every instantiation of the kernels by NVRTC, without a GPU.

``python tests/backends/kernels/compile.py`` prints the registers of each for every architecture. It
exits with 1 if one does not compile, spills, or keeps an array in local memory.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from cuda.bindings import nvrtc
from kvcompress_cupy import sources

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

_USED = re.compile(r"Used (\d+) registers")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel: registers of a thread and its bytes of local memory."""

    registers: int
    local: int


class CompileError(Exception):
    """The compiler's log."""


def compile_family(family: str, architecture: str) -> dict[str, Usage]:
    """Compile all instantiations of a kernel to a cubin.

    Returns
    -------
    dict of str to Usage
        By name expression.
    """
    program = _call(nvrtc.nvrtcCreateProgram, sources.source(family).encode(), b"", 0, [], [])
    try:
        return _compile(program, family, architecture)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compile(program: Any, family: str, architecture: str) -> dict[str, Usage]:
    names = sources.names(family)
    for name in names:
        _call(nvrtc.nvrtcAddNameExpression, program, name.encode())
    # As CuPy compiles them.
    options = [
        *sources.OPTIONS,
        "-ftz=true",
        "--device-as-default-execution-space",
        f"--gpu-architecture={architecture}",
        "--ptxas-options=-v",
    ]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = (
        _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        .decode()
        .rstrip("\0 \n")
    )
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or "warning" in log:
        raise CompileError(f"{family} for {architecture}:\n{log}")
    cubin = _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    usage = {}
    for name in names:
        symbol = _call(nvrtc.nvrtcGetLoweredName, program, name.encode())
        if symbol not in cubin:
            raise CompileError(f"{name} is not in the cubin for {architecture}")
        about = log[log.index(f"Compiling entry function '{symbol.decode()}'") :]
        used, local = _USED.search(about), _LOCAL.search(about)
        if used is None or local is None:
            raise CompileError(f"the log of {name} lacks its registers:\n{log}")
        usage[name] = Usage(int(used[1]), sum(map(int, local.groups())))
    return usage


def _call(function: Any, *arguments: Any) -> Any:
    status, *results = function(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{function.__name__}: {status}")
    return results[0] if results else None


def _text(program: Any, size: Any, read: Any) -> bytes:
    text = b" " * _call(size, program)
    _call(read, program, text)
    return text


def main() -> int:
    """Compile everything and print the table."""
    tasks = [(family, a) for family in sources.FAMILIES for a in ARCHITECTURES]
    families, architectures = zip(*tasks, strict=True)
    with ProcessPoolExecutor() as pool:
        try:
            usages = pool.map(compile_family, families, architectures)
            results = dict(zip(tasks, usages, strict=True))
        except CompileError as error:
            pool.shutdown(cancel_futures=True)
            print(error)
            return 1
    wrong = 0
    print(f"{'registers a thread':48}" + "".join(f"{a:>8}" for a in ARCHITECTURES))
    for family in sources.FAMILIES:
        for name in sources.names(family):
            row = [results[family, a][name] for a in ARCHITECTURES]
            line = f"{name:48}" + "".join(f"{usage.registers:8}" for usage in row)
            if any(usage.local for usage in row):
                wrong += 1
                line += "  bytes of local memory: " + " ".join(str(u.local) for u in row)
            print(line)
    count = sum(map(len, results.values()))
    print(f"{count} kernels compiled by NVRTC {nvrtc.nvrtcVersion()[1:]}, {wrong} use local memory")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
