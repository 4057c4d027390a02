"""``kvcompress bench``: time and memory of every operation on every library and backend here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import click
from rich.table import Table

from kvcompress.arrays import (
    FLOATING,
    Array,
    dtype_name,
    itemsize,
)
from kvcompress.backend import Dispatcher, select
from kvcompress.cli.console import InputError, progress, results_table, stdout
from kvcompress.cli.libraries import LIBRARIES, Library, installed, median_time
from kvcompress.cli.presets import presets, settings
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import OPERATIONS, Operation

Shape: TypeAlias = tuple[int, int, int, int]

BUDGET = 3.0
"""Seconds after which no call is repeated."""

HEADINGS = (
    "op",
    "library",
    "backend",
    "dtype",
    "ms",
    "GB/s",
    "memcpy",
    "generic",
    "outside",
    "peak",
)
CAPTION = """\
ms: median of up to {repeat} calls. GB/s: of the source (what is coded or restored).
memcpy: time over that of copying the source to memory already in use, in the same run.
generic: time over that of the generic form on the same library.
outside: share of the time outside operations, which are the kernels where there are any.
peak: bytes held beyond input and output, over the float32 size of the source."""


@dataclass(frozen=True)
class Case:
    """One call to be timed.

    Attributes
    ----------
    op, setting, library, backend : str
        What is called, how, and who runs it.
    run : callable
    arguments : tuple
    source : tuple of arrays
        What is coded or restored, uncoded.
    compressor : KVCacheCompressor, optional
        Whose method `run` is, for it runs more than one operation.
    """

    op: str
    setting: str
    library: str
    backend: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    source: tuple[Array, ...]
    compressor: KVCacheCompressor | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of a case; times in seconds."""

    case: Case
    time: float
    copy_time: float
    generic_time: float
    outside: float | None
    peak: int | None


@click.command()
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Choice(list(LIBRARIES)),
    help="Array library; may be repeated.  [default: all that are installed]",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("float16",),
    type=click.Choice(FLOATING),
    show_default=True,
    help="Of keys and values; may be repeated.",
)
@click.option(
    "--shape",
    metavar="B,H,T,D",
    default="1,8,8192,128",
    show_default=True,
    help="Of keys and values.",
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Timed calls.")
def bench(libraries: Sequence[str], dtypes: Sequence[str], shape: str, repeat: int) -> None:
    """Measure every operation, and every method at one of its settings, on normal random numbers.

    \b
    Examples:
      kvcompress bench
      kvcompress bench --library jax --shape 1,8,32768,128 --dtype bfloat16
      kvcompress bench --library numpy --library torch --repeat 21
    """  # noqa: D301 (click keeps the lines after \b)
    sizes = _shape(shape)
    here = {name: LIBRARIES[name]() for name in libraries or installed()}
    cases = (
        case
        for dtype in dtypes
        for name, library in here.items()
        for case in _cases(sizes, dtype, name, library)
    )
    generic: dict[tuple[str, ...], float] = {}
    measured = (_measure(case, here, repeat, generic) for case in cases)
    rows = list(progress(measured, None, "measuring"))
    stdout().print(_table(rows, f"{list(sizes)}", CAPTION.format(repeat=repeat)))


def _shape(text: str) -> Shape:
    try:
        batch, heads, tokens, head_dim = (int(n) for n in text.split(","))
    except ValueError:
        batch = heads = tokens = head_dim = 0
    if min(batch, heads, tokens, head_dim) < 1:
        raise InputError(
            f"--shape must be batch,heads,tokens,head_dim, four positive integers, got {text!r}"
        )
    return batch, heads, tokens, head_dim


def _measure(
    case: Case,
    libraries: Mapping[str, Library],
    repeat: int,
    generic: dict[tuple[str, ...], float],
) -> Row:
    """Time a case; the generic form of each comes first, and its time is kept in `generic`."""
    library = libraries[case.library]
    copies = [library.memcpy(x) for x in case.source]
    copy_time, _ = median_time(lambda: [copy() for copy in copies], repeat=max(repeat, 5))
    seconds, _ = median_time(lambda: case.run(*case.arguments), repeat=repeat, budget=BUDGET)
    key = case.op, case.setting, case.library, dtype_name(case.source[0].dtype)
    generic.setdefault(key, seconds)
    return Row(
        case,
        seconds,
        copy_time,
        generic[key],
        _outside(case, case.compressor) if case.compressor and not library.compiles else None,
        library.peak(case.run, *case.arguments),
    )


def _outside(case: Case, compressor: KVCacheCompressor) -> float:
    """Share of the time of a compressor that no operation takes."""
    watch = _Stopwatch(select(compressor.backend).backends)
    timed = getattr(replace(compressor, backend=watch), f"{case.op}_kv")
    start = time.perf_counter()
    timed(*case.arguments)
    return 1 - sum(watch.seconds) / (time.perf_counter() - start)


@dataclass(frozen=True)
class _Stopwatch(Dispatcher):
    """Counts the time that operations take."""

    seconds: list[float] = field(default_factory=list, compare=False)

    def __call__(self, op: Callable[..., Any], *arrays: Array, **static: Any) -> Any:
        start = time.perf_counter()
        result = super().__call__(op, *arrays, **static)
        self.seconds.append(time.perf_counter() - start)
        return result


def _cases(shape: Shape, dtype: str, name: str, library: Library) -> Iterator[Case]:
    choices = tuple(dict.fromkeys((Dispatcher(), select())))  # the same, where there are no kernels
    for op, call in _operations(shape, dtype, library):
        for chosen in choices:
            backend = chosen.backend_for(op.name, *call.arrays, **call.static)
            if backend is not None or not chosen.backends:
                who = "generic" if backend is None else backend.name
                run = library.compile(partial(chosen, op.function, **call.static))
                source = call.arrays[0] if call.source is None else call.source
                yield Case(op.name, call.label, name, who, run, call.arrays, (source,))
    inputs = Inputs((shape[0] * shape[1], *shape[2:]), dtype, "typical", library.array)
    source = tuple(inputs.tensor(shape) for _ in range(2))
    fast = select().backend_for("quantize", source[0], spec=AffineSpec(4, 64, "token"))
    for method_name, known in presets([shape[-1]]).items():
        method = known[len(known) // 2]
        setting = f"{method_name}: {settings(method)}"
        for chosen in (Dispatcher(), *([select()] if fast else [])):
            who = "generic" if fast is None or not chosen.backends else fast.name
            compressor = KVCacheCompressor(method, backend=chosen)
            compress = library.compile(compressor.compress_kv)
            yield Case("compress", setting, name, who, compress, source, source, compressor)
            decompress = library.compile(compressor.decompress_kv)
            compressed = (compress(*source),)
            yield Case("decompress", setting, name, who, decompress, compressed, source, compressor)


def _operations(shape: Shape, dtype: str, library: Library) -> Iterator[tuple[Operation, Call]]:
    """Every operation at its typical settings, in `dtype` if it is for that."""
    folded = (shape[0] * shape[1], *shape[2:])
    for op in list(OPERATIONS.values()):
        drawn = dtype if dtype in op.dtypes else op.dtypes[0]
        inputs = Inputs(folded, drawn, "typical", library.array)
        yield from ((op, call) for call in op.examples(inputs))


def _table(rows: Sequence[Row], title: str, caption: str) -> Table:
    by_setting: dict[str, list[list[str]]] = {}
    for row in rows:
        by_setting.setdefault(row.case.setting, []).append(_row(row))
    return results_table(by_setting.items(), headings=HEADINGS, title=title, caption=caption)


def _row(row: Row) -> list[str]:
    size = sum(math.prod(x.shape) for x in row.case.source)
    dtype = dtype_name(row.case.source[0].dtype)
    return [
        row.case.op,
        row.case.library,
        row.case.backend,
        dtype,
        f"{1e3 * row.time:.2f}",
        f"{size * itemsize(dtype) / row.time / 1e9:.2g}",
        f"{row.time / row.copy_time:.2f}",
        f"{row.time / row.generic_time:.3f}",
        "" if row.outside is None else f"{row.outside:.0%}",
        "" if row.peak is None else f"{row.peak / (4 * size):.2f}",
    ]
