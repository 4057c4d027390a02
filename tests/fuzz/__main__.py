"""Mutate files of every format, load them, and use what loads: ``python -m fuzz [MUTATIONS]``.

A file is refused by a `CalibrationError`, or what it holds is used: then only errors of kvcompress
may be raised, and results are finite. No case takes over a second of a processor, or more memory
than file, arrays declared in it and 64 MiB. Cases depend on the seed and their number only:
``--case N`` repeats one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from fuzz.container import File
from fuzz.formats import Format, draw, formats
from fuzz.mutations import mutate, one

from kvcompress.errors import CalibrationError, KVCompressError

SECONDS = 1.0
MEMORY = 64 << 20
TRACED = 25
"""Of so many cases one is traced for memory, and read by the package safetensors too."""
CHUNK = 100
SCALES = (1.0, 1.0, 1.0, 2.0**-30, 2.0**60, 2.0**119, 0.0)


@dataclass
class Tally:
    """What became of the cases of a format."""

    counts: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.errors += other.errors
        self.slowest = max(self.slowest, other.slowest)
        self.failures += other.failures


known_formats = cache(formats)


def inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values: ordinary ones, tiny, huge and zero; float32 or float16."""
    scale, half, tokens = one(rng, SCALES), rng.random() < 0.3, int(one(rng, (1, 12, 12, 130)))
    k, v = (draw(rng, 1, 2, tokens, 4) for _ in range(2))
    with np.errstate(over="ignore"):
        k, v = (np.clip(x * np.float32(scale), -(2.0**119), 2.0**119) for x in (k, v))
    if half:
        return tuple(np.clip(x, -6e4, 6e4).astype("f2") for x in (k, v))
    return k, v


def attempt(form: Format, path: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Load and use a file: the stage that was reached, and the error, if any."""
    stage = "refused"
    try:
        thing = form.load(path)
        stage = "accepted"
        for x in form.use(thing, *inputs(rng)):
            if not np.all(np.isfinite(np.asarray(x, "f4"))):
                return "not finite", ""
    except KVCompressError as error:
        if stage == "refused" and not isinstance(error, CalibrationError):
            return "untyped", f"{type(error).__name__} at load\n{traceback.format_exc()}"
        return stage, type(error).__name__
    except Exception as error:
        return "untyped", f"{type(error).__name__}\n{traceback.format_exc()}"
    return stage, ""


def run(seed: int, case: int, path: Path, tally: dict[str, Tally], trace: bool) -> None:
    """One case."""
    rng = np.random.default_rng((seed, case))
    name = list(known_formats())[case % len(known_formats())]
    form, found = known_formats()[name], tally.setdefault(name, Tally())
    original = one(rng, form.files)
    raw, sealed = mutate(original, rng)
    path.write_bytes(raw)
    state = rng.bit_generator.state

    def once() -> tuple[str, str, float]:
        rng.bit_generator.state = state
        start = time.process_time()
        return *attempt(form, path, rng), time.process_time() - start

    if trace:
        tracemalloc.start()
    stage, error, took = once()
    problems = [f"{stage}: {error}"] if stage in ("untyped", "not finite") else []
    if trace:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        allowed = 2 * len(raw) + MEMORY  # a file cannot declare more than it holds
        if peak > allowed:
            problems.append(f"memory: {peak:,} bytes of {allowed:,}")
    elif took > SECONDS:
        took = min(took, once()[2])  # another process may have been in the way
        if took > SECONDS:
            problems.append(f"slow: {took:.2f} s")
    if stage != "refused":
        problems += unnoticed(original, raw, sealed, trace)
    found.counts.update(["mutations", stage, *(problem.partition(":")[0] for problem in problems)])
    if error and stage in ("refused", "accepted"):
        found.errors[f"{error}, {stage}"] += 1
    found.slowest = max(found.slowest, (0.0 if trace else took, case))
    found.failures += [f"{name}, case {case}: {problem}" for problem in problems]


def unnoticed(original: bytes, raw: bytes, sealed: bool, trace: bool) -> list[str]:
    """What should have kept a file from being accepted."""
    if not sealed:
        a, b = File.parse(original), File.parse(raw)
        if (a.arrays, a.metadata) != (b.arrays, b.metadata):
            return ["unnoticed: accepted, with a wrong checksum"]
    if trace:
        import safetensors

        try:
            safetensors.deserialize(raw)
        except safetensors.SafetensorError as error:
            return [f"unnoticed: accepted, but not by safetensors: {error}"]
    return []


def chunk(seed: int, start: int, stop: int) -> dict[str, Tally]:
    """Cases from `start` to `stop`."""
    warnings.simplefilter("ignore")
    tally: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as directory:
        for case in range(start, stop):
            # The number of formats divides none of the traced ones' distance.
            run(seed, case, Path(directory) / "x", tally, trace=case % TRACED == 0)
    return tally


def report(tally: dict[str, Tally]) -> None:
    columns = ("mutations", "refused", "accepted", "untyped", "not finite", "slow", "memory")
    columns += ("unnoticed",)
    print(f"{'format':24}", *(f"{column:>10}" for column in columns), f"{'slowest':>10}")
    for name, found in [*sorted(tally.items()), ("all", total(tally))]:
        cells = [f"{found.counts[column]:10,}" for column in columns]
        print(f"{name:24}", *cells, f"{1000 * found.slowest[0]:7.0f} ms")
    for error, count in total(tally).errors.most_common():
        print(f"{count:10,}  {error}")


def total(tally: dict[str, Tally]) -> Tally:
    everything = Tally()
    for found in tally.values():
        everything.add(found)
    return everything


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mutations", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat one case, and nothing else")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    asked = parser.parse_args()
    start, tally = time.monotonic(), {}
    if asked.case is not None:
        tally = chunk(asked.seed, asked.case, asked.case + 1)
    else:
        starts = range(0, asked.mutations, CHUNK)
        with ProcessPoolExecutor(asked.processes) as pool:
            stops = (min(at + CHUNK, asked.mutations) for at in starts)
            for part in pool.map(chunk, [asked.seed] * len(starts), starts, stops):
                for name, found in part.items():
                    tally.setdefault(name, Tally()).add(found)
    report(tally)
    failures = total(tally).failures
    for failure in failures[:10]:
        print(f"\n{failure}")
    seconds = time.monotonic() - start
    print(f"\n{len(failures)} failures, seed {asked.seed}, {seconds:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    os.environ.setdefault("KVCOMPRESS_BACKEND", "generic")
    sys.exit(main())
