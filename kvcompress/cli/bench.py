"""``kvcompress bench``: time and memory of every operation on every library and backend here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import click
import numpy as np
from rich.table import Table

from kvcompress import ops
from kvcompress.arrays import (
    FLOAT16_MAX,
    FLOATING,
    Array,
    dtype_name,
    dtype_of,
    itemsize,
    namespace_of,
)
from kvcompress.backend import Dispatcher, select
from kvcompress.cli.console import InputError, progress, results_table, stdout
from kvcompress.cli.libraries import LIBRARIES, Library, installed, median_time
from kvcompress.cli.presets import presets, settings
from kvcompress.compressor.compressor import KVCacheCompressor
from kvcompress.ops import AffineSpec, RotatedSpec

Shape: TypeAlias = tuple[int, int, int, int]

BITS, GROUP, VECTOR_DIM, CODEBOOK = 4, 64, 4, 256
"""Settings of the operations: the usual ones."""

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
    ops : Ops, optional
        Of a compressor, which runs more than one operation.
    """

    op: str
    setting: str
    library: str
    backend: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    source: tuple[Array, ...]
    ops: Dispatcher | None = None


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
        _outside(case, case.ops) if case.ops and not library.compiles else None,
        library.peak(case.run, *case.arguments),
    )


def _outside(case: Case, ops: Dispatcher) -> float:
    """Share of the time of a compressor that no operation takes."""
    watch = _Stopwatch(ops.backends)
    with patch("kvcompress.compressor.compressor.select", lambda _: watch):
        start = time.perf_counter()
        case.run(*case.arguments)
        return 1 - sum(watch.seconds) / (time.perf_counter() - start)


@dataclass(frozen=True)
class _Stopwatch(Dispatcher):
    """Counts the time that operations take."""

    seconds: list[float] = field(default_factory=list)

    def __call__(self, op: Callable[..., Any], *arrays: Array, **static: Any) -> Any:
        start = time.perf_counter()
        result = super().__call__(op, *arrays, **static)
        self.seconds.append(time.perf_counter() - start)
        return result


def _cases(shape: Shape, dtype: str, name: str, library: Library) -> Iterator[Case]:
    x, y = (_normal(shape, dtype, seed, library) for seed in (0, 1))
    for op, setting, source, arguments, static in _operations(
        library.xp.reshape(x, (-1, *shape[-2:])), library
    ):
        for chosen in dict.fromkeys(
            (Dispatcher(), select())
        ):  # the same, where there are no kernels
            backend = chosen.backend_for(op.__name__, *arguments, **static)
            if backend is not None or not chosen.backends:
                who = "generic" if backend is None else backend.name
                run = library.compile(partial(chosen, op, **static))
                yield Case(op.__name__, setting, name, who, run, arguments, (source,))
    fast = select().backend_for("quantize", x, spec=AffineSpec(BITS, GROUP, "token"))
    for method_name, known in presets([shape[-1]]).items():
        method = known[len(known) // 2]
        for chosen in (Dispatcher(), *([select()] if fast else [])):
            who = "generic" if fast is None or not chosen.backends else fast.name
            compressor = KVCacheCompressor(method, backend=None if chosen.backends else "generic")
            setting, source = f"{method_name}: {settings(method)}", (x, y)
            compress = library.compile(compressor.compress_kv)
            yield Case("compress", setting, name, who, compress, source, source, chosen)
            decompress = library.compile(compressor.decompress_kv)
            compressed = (compress(x, y),)
            yield Case("decompress", setting, name, who, decompress, compressed, source, chosen)


def _operations(x: Array, library: Library) -> Iterator[tuple[Any, ...]]:
    """Operation, setting, what is coded or restored, arguments, static arguments."""
    xp, channels = library.xp, x.shape[-1]
    yield ops.within, "", x, (x,), {"limit": FLOAT16_MAX}
    wide = xp.astype(x, xp.float32)
    yield ops.cast, "to float16", wide, (wide,), {"dtype": "float16"}
    for axis in ("channel", "token"):
        spec = AffineSpec(BITS, GROUP, axis)
        setting = f"{BITS} bits, {GROUP} a group, per {axis}"
        yield ops.quantize, setting, x, (x,), {"spec": spec}
        static = {"spec": spec, "channels": channels, "dtype": dtype_name(x.dtype)}
        quantized = library.compile(partial(select(), ops.quantize, spec=spec))(x)
        yield ops.dequantize, setting, x, quantized, static
    rotated = RotatedSpec(BITS, 0)
    setting = f"{BITS} bits, rotated"
    yield ops.quantize_rotated, setting, x, (x,), {"spec": rotated}
    static = {"spec": rotated, "channels": channels, "dtype": dtype_name(x.dtype)}
    quantized = library.compile(partial(select(), ops.quantize_rotated, spec=rotated))(x)
    yield ops.dequantize_rotated, setting, x, quantized, static
    clipped = AffineSpec(2, GROUP, "token")
    yield ops.clip_groups, f"2 bits, {GROUP} a group, per token", x, (x,), {"spec": clipped}
    dim = math.gcd(VECTOR_DIM, channels)
    vectors = xp.reshape(wide, (-1, dim))
    codebook = vectors[:CODEBOOK, :]
    setting = f"{codebook.shape[0]} codes of {dim} values"
    yield ops.nearest, setting, vectors, (vectors, codebook), {}
    codes = library.compile(partial(select(), ops.nearest))(vectors, codebook)
    yield ops.lookup, setting, vectors, (codes, codebook), {}


def _normal(shape: Shape, dtype: str, seed: int, library: Library) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return library.array(x.astype(dtype_of(namespace_of(np), dtype)))


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
