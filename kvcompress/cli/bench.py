"""``kvcompress bench``: time and memory of every operation, beside a memcpy of its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import click
import numpy as np
from rich.table import Table

from kvcompress import ops
from kvcompress._namespace import FLOATING, Array, dtype_name, dtype_of, itemsize, namespace_of
from kvcompress.backend import Ops, select
from kvcompress.cli.console import InputError, progress, results_table, stdout
from kvcompress.cli.ladder import NAMES, ladder, settings
from kvcompress.cli.libraries import LIBRARIES, Library, library_option, median_time
from kvcompress.compressor import KVCacheCompressor
from kvcompress.ops import AffineSpec

Shape: TypeAlias = tuple[int, int, int, int]

BITS, GROUP, VECTOR_DIM, CODEBOOK = 4, 64, 4, 256
"""Settings of the operations: the usual ones."""

HEADINGS = ("op", "backend", "dtype", "time", "GB/s", "memcpy", "peak", "2T/T")
CAPTION = """\
time: median of {repeat} calls. GB/s: of the source (what is coded or restored).
memcpy: time over that of copying the source, measured in the same run.
peak: bytes held beyond input and output, over the float32 size of the source.
2T/T: time for twice the tokens over time; 2 is linear."""


@dataclass(frozen=True)
class Case:
    """One call to be timed.

    Attributes
    ----------
    op, setting, backend : str
        What is called, how, and who runs it.
    run : callable
    arguments : tuple
    source : tuple of arrays
        What is coded or restored, uncoded.
    """

    op: str
    setting: str
    backend: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    source: tuple[Array, ...]


@dataclass(frozen=True)
class Row:
    """What was measured of a case; times in seconds."""

    case: Case
    time: float
    copy_time: float
    peak: int | None
    twice_time: float


@click.command()
@library_option
@click.option("--backend", help="auto, generic, or a backend's name.  [default: auto]")
@click.option(
    "--shape",
    metavar="B,H,T,D",
    default="1,8,2048,128",
    show_default=True,
    help="Of keys and values.",
)
@click.option(
    "--dtype", type=click.Choice(FLOATING), default="float16", show_default=True, help="Of both."
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Timed calls.")
def bench(library: str, backend: str | None, shape: str, dtype: str, repeat: int) -> None:
    """Measure every operation, and every method at one of its settings, on normal random numbers.

    \b
    Examples:
      kvcompress bench
      kvcompress bench --library jax --shape 1,8,32768,128 --dtype bfloat16
      kvcompress bench --backend generic --repeat 21
    """  # noqa: D301
    run = LIBRARIES[library]()
    make = partial(_cases, dtype=dtype, library=run, backend=backend)
    batch, heads, tokens, head_dim = sizes = _shape(shape)
    pairs = zip(make(sizes), make((batch, heads, 2 * tokens, head_dim)), strict=True)
    total = 8 + 2 * len(NAMES)
    rows = list(progress((_measure(*pair, run, repeat) for pair in pairs), total, "measuring"))
    title = f"{list(sizes)} {dtype}, {library}"
    stdout().print(_table(rows, title, CAPTION.format(repeat=repeat)))


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


def _measure(case: Case, twice: Case, library: Library, repeat: int) -> Row:
    def time(case: Case) -> float:
        return median_time(lambda: case.run(*case.arguments), repeat=repeat)[0]

    copies = [library.memcpy(x) for x in case.source]
    copy_time, _ = median_time(lambda: [copy() for copy in copies], repeat=repeat)
    peak = library.peak(case.run, *case.arguments)
    return Row(case, time(case), copy_time, peak, time(twice))


def _cases(shape: Shape, *, dtype: str, library: Library, backend: str | None) -> Iterator[Case]:
    x, y = (_normal(shape, dtype, seed, library) for seed in (0, 1))
    chosen = select(backend)
    yield from _op_cases(library.xp.reshape(x, (-1, *shape[-2:])), chosen, library)
    everyone = "+".join([b.name for b in chosen.backends] or ["generic"])
    for name, rungs in ladder([shape[-1]]).items():
        method = rungs[len(rungs) // 2]
        compressor = KVCacheCompressor(method, backend=backend)
        setting, source = f"{name}: {settings(method)}", (x, y)
        compress = library.compile(compressor.compress_kv)
        yield Case("compress", setting, everyone, compress, source, source)
        decompress = library.compile(compressor.decompress_kv)
        yield Case("decompress", setting, everyone, decompress, (compress(x, y),), source)


def _op_cases(x: Array, chosen: Ops, library: Library) -> Iterator[Case]:
    xp = library.xp
    channels = x.shape[-1]

    def case(
        op: Callable[..., Any], setting: str, source: Array, *args: Array, **static: Any
    ) -> Case:
        backend = chosen.backend_for(op.__name__, *args, **static)
        who = "generic" if backend is None else backend.name
        run = library.compile(partial(chosen, op, **static))
        return Case(op.__name__, setting, who, run, args, (source,))

    codes = library.array(np.random.default_rng(2).integers(0, 2**BITS, x.shape, dtype=np.uint8))
    yield (pack := case(ops.pack, f"{BITS} bits a code", codes, codes, bits=BITS))
    packed = pack.run(codes)
    yield case(ops.unpack, f"{BITS} bits a code", codes, packed, bits=BITS, n=channels)
    for axis in ("channel", "token"):
        spec = AffineSpec(BITS, GROUP, axis)
        setting = f"{BITS} bits, {GROUP} a group, per {axis}"
        yield (quantize := case(ops.quantize, setting, x, x, spec=spec))
        quantized = quantize.run(x)
        yield case(ops.dequantize, setting, x, *quantized, spec=spec, channels=channels)
    dim = math.gcd(VECTOR_DIM, channels)
    vectors = xp.reshape(xp.astype(x, xp.float32), (-1, dim))
    codebook = vectors[:CODEBOOK, :]
    setting = f"{codebook.shape[0]} codes of {dim} values"
    yield (nearest := case(ops.nearest, setting, vectors, vectors, codebook))
    yield case(ops.lookup, setting, vectors, nearest.run(vectors, codebook), codebook)


def _normal(shape: Shape, dtype: str, seed: int, library: Library) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return library.array(x.astype(dtype_of(namespace_of(np), dtype)))


def _table(rows: Sequence[Row], title: str, caption: str) -> Table:
    by_setting = groupby(rows, lambda row: row.case.setting)
    return results_table(
        ((setting, [_row(row) for row in group]) for setting, group in by_setting),
        headings=HEADINGS,
        title=title,
        caption=caption,
    )


def _row(row: Row) -> list[str]:
    size = sum(math.prod(x.shape) for x in row.case.source)
    dtype = dtype_name(row.case.source[0].dtype)
    return [
        row.case.op,
        row.case.backend,
        dtype,
        _duration(row.time),
        f"{size * itemsize(dtype) / row.time / 1e9:.2g}",
        f"{row.time / row.copy_time:.1f}x",
        "-" if row.peak is None else f"{row.peak / (4 * size):.2f}x",
        f"{row.twice_time / row.time:.2f}",
    ]


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"
