"""Changes to files that know what a file is made of; most files that result are sealed again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
from fuzz.container import DTYPES, File

Random = np.random.Generator
Mutation = Callable[[File, Random], None]

SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-310, 1e-45, 6e-8, 1e308, -1e308)
SPECIAL += (3e38, -3e38, 65504.0, -65504.0, 2.0**15, 2.0**31, 2.0**53, 2.0**63, 0.5, 256.0, 1e-3)

JUNK = (None, True, False, -1, 0, 1, 2, 255, 2**31, 2**63, 10**39, -(10**39), 10**60, 0.5, 1e-300)
JUNK += (
    1e308,
    -1.5,
    "",
    "0",
    "x" * 300,
    "\ud800",
    [],
    {},
    [[]],
    {"": 0},
    [None],
    [1, 2, 3],
    "head",
)
JUNK += (1e-30, 1e30, 1.0000000000000002, 64, 3)

SCALINGS = {
    "LinearScaling": ("factor",),
    "ProportionalScaling": ("rotated", "factor"),
    "DynamicScaling": ("factor", "max_positions"),
    "YarnScaling": (
        *("factor", "original_max_positions", "attention_factor", "beta_fast", "beta_slow"),
        "truncate",
    ),
    "Llama3Scaling": (
        *("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
    ),
    "LongRopeScaling": (
        *("short_factors", "long_factors", "original_max_positions", "attention_factor"),
    ),
    "Nothing": ("factor",),
    "RopeScaling": (),
}


def one(rng: Random, things):
    """One of some things."""
    things = list(things)
    return things[int(rng.integers(len(things)))]


def _part(x: np.ndarray, rng: Random):
    """An index of one number, a run along the first axis, or all."""
    if x.ndim == 0 or rng.random() < 0.2:
        return ...
    if rng.random() < 0.5:
        return tuple(int(rng.integers(n)) for n in x.shape)
    start = int(rng.integers(len(x)))
    return slice(start, start + 1 + int(rng.integers(4)))


def _changeable(file: File, rng: Random, kinds: str = "F,I,U"):
    """An array of these kinds of dtypes that is what its header says, if there is one."""
    names = [
        name
        for name, (dtype, shape, data) in file.arrays.items()
        if len(data)
        and dtype in DTYPES
        and isinstance(shape, list)
        and len(data) == math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        and dtype.startswith(tuple(kinds.split(",")))
    ]
    return one(rng, names) if names else None


def values(file: File, rng: Random) -> None:
    """Set numbers to special ones, scale them, or change their bits."""
    name = _changeable(file, rng)
    if name is None:
        return
    x = file.array(name)
    part, kind = _part(x, rng), int(rng.integers(6))
    with np.errstate(all="ignore"):
        if kind == 0 and x.dtype.kind == "f":
            x[part] = one(rng, SPECIAL)
        elif kind == 0:
            info = np.iinfo(x.dtype)
            x[part] = one(rng, (0, 1, info.max, info.min, info.max // 2, 95, 96, 32768 % info.max))
        elif kind == 1 and x.dtype.kind == "f":
            x[part] = x[part] * x.dtype.type(2.0 ** int(rng.integers(-40, 40)))
        elif kind == 2:
            x[part] = -x[part] if x.dtype.kind in "fi" else x[part] ^ 1
        elif kind == 3:
            flat = x.reshape(-1).view(np.uint8)
            flat[rng.integers(flat.size, size=3)] ^= np.uint8(1 << rng.integers(8))
        elif kind == 4:
            flat = x.reshape(-1)
            flat[:] = flat[rng.permutation(flat.size)]
        elif x.dtype.kind == "f":
            x[part] = x[part] + np.asarray(rng.standard_normal(), x.dtype) * np.abs(x).max()
        else:
            x[part] = x[part] + 1
    file.put(name, x)


def scaled(file: File, rng: Random) -> None:
    """Scale a whole array: what shapes, signs and relations within it cannot tell."""
    name = _changeable(file, rng, "F")
    if name is not None:
        x = file.array(name)
        with np.errstate(all="ignore"):
            x = x * x.dtype.type(2.0 ** int(one(rng, (-200, -60, -20, -8, -2, 1, 8, 20, 60, 200))))
        file.put(name, x)


def constant(file: File, rng: Random) -> None:
    """Set a whole array to one number, or to zero, or a matrix to a multiple of the identity."""
    name = _changeable(file, rng, "F")
    if name is not None:
        x = file.array(name)
        with np.errstate(all="ignore"):
            x[...] = one(rng, SPECIAL)
        if x.ndim >= 2 and x.shape[-1] == x.shape[-2] and rng.random() < 0.5:
            x *= np.eye(x.shape[-1], dtype=x.dtype)
        file.put(name, x)


def counted(file: File, rng: Random) -> None:
    """Move frequencies from one symbol to another; the sum is kept, or missed by one."""
    name = _changeable(file, rng, "U16")
    if name is None:
        return values(file, rng)
    x = np.atleast_1d(file.array(name))
    row = x.reshape(-1, x.shape[-1])[int(rng.integers(x.size // x.shape[-1]))]
    a, b = int(np.argmax(row)), int(rng.integers(len(row)))
    many = int(rng.integers(int(row[a]) + 1))
    row[a] -= many
    row[b] += many + int(rng.random() < 0.2)
    file.put(name, x)
    return None


def mapping(file: File, rng: Random) -> None:
    """Drop, rename, add, copy, swap or repeat an array."""
    name, other = one(rng, file.arrays or [""]), one(rng, file.arrays or [""])
    kind = int(rng.integers(7))
    if name == "":
        return
    if kind == 0:
        del file.arrays[name]
    elif kind == 1:
        changed = one(rng, ("x", "", "0.", f"{name}.0", f"1{name}", name[1:], "0.x", f"00{name}"))
        file.arrays[changed] = file.arrays.pop(name)
    elif kind == 2:
        file.put(one(rng, ("x", "0.x", "5.x", "0.keys.codebooks.99")), np.zeros(3, "f4"))
    elif kind == 3:
        file.arrays[name] = list(file.arrays[other])
    elif kind == 4:
        file.arrays[name], file.arrays[other] = file.arrays[other], file.arrays[name]
    elif kind == 5:
        file.repeated = (name,)
    else:
        lead = name.partition(".")[0]
        for held in [n for n in file.arrays if n.startswith(f"{lead}.")]:
            entry = list(file.arrays.pop(held))
            file.arrays[f"{one(rng, ('7', '65536', lead, '-1'))}.{held.partition('.')[2]}"] = entry


def shape(file: File, rng: Random) -> None:
    """Another shape or dtype, with the data that go with it, or without."""
    name = one(rng, file.arrays or [""])
    if name == "":
        return
    _, sizes, data = file.arrays[name]
    kind = int(rng.integers(7))
    if kind == 0:
        file.arrays[name][0] = one(rng, [*DTYPES, "BF16", "F8_E4M3", "C64", "F4", "Z", 3, None])
    elif kind == 1:
        file.arrays[name][1] = one(
            rng, ([], [1], [0], [2**31, 2**31], [2**63], [-1], [0, 2**62, 9], [1] * 70, None, [1.0])
        )
    elif kind == 2:
        file.arrays[name][1] = list(reversed(sizes)) if isinstance(sizes, list) else []
    elif kind == 3 and (name := _changeable(file, rng)):
        x = file.array(name)
        axis = int(rng.integers(max(1, x.ndim)))
        keep = int(rng.integers(x.shape[axis] + 1)) if x.ndim else 0
        x = np.take(x, range(keep), axis) if x.ndim else np.zeros((0,), x.dtype)
        file.put(name, x)
    elif kind == 4 and (name := _changeable(file, rng)):
        x = file.array(name)
        wanted = one(rng, [d for d in DTYPES.values() if d != "|b1"])
        with np.errstate(all="ignore"):
            file.put(name, x.astype(wanted))
    elif kind == 5 and (name := _changeable(file, rng)):
        x = file.array(name)
        file.put(name, np.concatenate([x, x]) if x.ndim else x[None])
    else:
        file.arrays[name][2] = data[: int(rng.integers(len(data) + 1))]


def _places(value, path=()):
    """Paths to everything in a value of JSON."""
    yield path
    for key in (
        value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    ):
        yield from _places(value[key], (*path, key))


def facts(file: File, rng: Random) -> None:
    """Replace, drop, add or exchange something in the facts."""
    try:
        known = file.facts
    except (ValueError, RecursionError):
        return
    path = one(rng, _places(known))
    if not path:
        file.text = json.dumps(one(rng, JUNK))
        return
    holder = known
    for key in path[:-1]:
        holder = holder[key]
    kind, at = int(rng.integers(6)), path[-1]
    if kind <= 2:
        holder[at] = one(rng, JUNK)
    elif kind == 3:
        del holder[at]
    elif kind == 4 and isinstance(holder, dict):
        holder[one(rng, ("x", "rows", "0", "1", "", "options"))] = one(rng, JUNK)
    elif isinstance(holder[at], int | float):
        holder[at] = holder[at] * one(rng, (2, 0.5, -1, 0, 10**9)) + one(rng, (0, 1, -1))
    file.text = json.dumps(known)


def embedding(file: File, rng: Random) -> None:
    """Other rotary embeddings, of numbers that mostly can be."""
    try:
        groups = file.facts["groups"]
        shapes = [shape for group in groups for shape in group["group"]["shapes"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return facts(file, rng)
    if not shapes:
        return None
    target = one(rng, shapes)
    numbers = (1, 2, 0.5, 4, 64, 4096, 1e-3, 1e4, 1e30, 1e-30, 1e300, 1e-300, 0, -1, None, True)
    kind = one(rng, SCALINGS)
    scaling = {"kind": kind} | {name: one(rng, numbers) for name in SCALINGS[kind]}
    for name in ("short_factors", "long_factors"):
        if name in scaling:
            scaling[name] = [one(rng, numbers) for _ in range(int(one(rng, (2, 2, 2, 1, 3))))]
    if "original_max_positions" in scaling:
        scaling["original_max_positions"] = one(rng, (1, 64, 4096, 2**40, 0, 1e3))
    dim = target["key_dim"] if isinstance(target, dict) and "key_dim" in target else 4
    if isinstance(target, dict):
        target["rope"] = {
            "dim": one(rng, (dim, dim, dim, 2, 3, 2**31 - 2)),
            "theta": one(rng, (1, 10000.0, 1e9, 1e300, 1.0000000000000002)),
            "interleaved": one(rng, (True, False)),
            "head_dim": one(rng, (dim, dim, dim, 0, 2**31)),
            "scaling": scaling if rng.random() < 0.9 else None,
        }
    whole = file.facts
    for group, changed in zip(whole["groups"], groups, strict=True):
        group["group"] = changed["group"]
    file.text = json.dumps(whole)
    return None


def text(file: File, rng: Random) -> None:
    """What JSON should not be."""
    known = file.text
    at = int(rng.integers(len(known) + 1))
    deep = int(one(rng, (40, 200, 100_000)))
    file.text = one(
        rng,
        (
            "[" * deep,
            "[" * deep + "]" * deep,
            '{"a":' * deep + "1" + "}" * deep,
            "9" * 5000,
            known.replace("0", "9" * 50, 1),
            known.replace("0", "1e999", 1),
            known.replace("0", "NaN", 1),
            known.replace("1", "-Infinity", 1),
            known.replace("{", '{"groups":[],"groups":[],', 1),
            known[:at],
            known[:at] + one(rng, '{}[]",:0x\\') + known[at:],
            "",
            "\ufeff" + known,
            '"' + "x" * (1 << 20),
            "[" + "[]," * 300_000 + "0]" if rng.random() < 0.02 else "[]",
        ),
    )


def header(file: File, rng: Random) -> None:
    """Oddities of the header: lengths, offsets, metadata, what follows the data."""
    kind = int(rng.integers(8))
    name = one(rng, file.arrays or ["__metadata__"])
    if kind == 0:
        file.lead = one(rng, (0, 1, 7, 8, 100, 2**24, 2**31, 2**63, 2**64 - 1))
    elif kind == 1:
        file.tail = bytes(int(rng.integers(1, 64)))
    elif kind == 2:
        file.cut = int(rng.integers(1, 300))
    elif kind == 3:
        file.metadata.pop(one(rng, list(file.metadata) or [""]), None)
    elif kind == 4:
        file.metadata[one(rng, ("format", "facts", "sha256", "x"))] = one(rng, JUNK)
    elif kind == 5:
        file.metadata["format"] = f"kvcompress.plan.{one(rng, range(9))}"
    elif name in file.arrays:
        dtype, sizes, data = file.arrays[name]
        offsets = one(
            rng, ([0, 0], [0, len(data)], [-1, 5], [0, 2**63], [2**64, 0], [5], None, ["0", 1])
        )
        entry = {"dtype": dtype, "shape": sizes, "data_offsets": offsets}
        if kind == 6:
            file.overrides[name] = entry
        else:
            file.overrides[name] = one(rng, (*JUNK, {}, {**entry, "x": 1}, {"dtype": dtype}))


MUTATIONS: dict[Mutation, float] = {
    values: 4,
    scaled: 2,
    constant: 1,
    counted: 1,
    mapping: 1.5,
    shape: 2,
    facts: 3,
    embedding: 1,
    text: 0.7,
    header: 1.5,
}
"""Mutations and how often they come."""


def mutate(raw: bytes, rng: Random) -> tuple[bytes, bool]:
    """Return a changed file, and whether its checksum is right."""
    if rng.random() < 0.05:
        flipped = bytearray(raw)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(raw) if rng.random() < 0.5 else min(len(raw), 2000)))
            flipped[at] ^= 1 << int(rng.integers(8))
        return bytes(flipped), False
    file = File.parse(raw)
    weights = np.array(list(MUTATIONS.values()))
    for _ in range(int(one(rng, (1, 1, 1, 1, 2, 3)))):
        mutation = list(MUTATIONS)[int(rng.choice(len(weights), p=weights / weights.sum()))]
        mutation(file, rng)
    sealed = rng.random() < 0.9
    if sealed:
        odd = "sha256" in file.metadata and file.metadata["sha256"] in JUNK
        if "sha256" in file.metadata and not odd:
            file.seal()
    return file.write(), sealed
