"""Faults planted in the kernels are found, so the tests that pass without them mean something."""
# ruff: noqa: E501 (a mutant is a line)

from __future__ import annotations

from dataclasses import dataclass

import hard
import numpy as np
import pytest
from emulation import EmulationError, build
from kvcompress_cupy.launches import clipping as clipping_launches
from kvcompress_cupy.launches import rotated as rotated_launches
from kvcompress_cupy.sources import name, source

from conftest import EmulatedBackend
from kvcompress import ops
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.rotated import RotatedSpec

BARRIER = "__syncthreads();", ";"


@dataclass(frozen=True)
class Mutant:
    """A change of a kernel's source: `count` occurrences of `old`, or the `which`-th alone."""

    family: str
    what: str
    old: str
    new: str
    which: int | None = None

    def __str__(self) -> str:
        return f"{self.family}: {self.what}"

    def __call__(self, text: str) -> str:
        pieces = text.split(self.old)
        assert len(pieces) > 1, f"{self.old!r} is not in the source"
        if self.which is None:
            return self.new.join(pieces)
        at = self.which + 1 if self.which >= 0 else len(pieces) + self.which
        return self.old.join(pieces[:at]) + self.new + self.old.join(pieces[at:])


HALF_EVEN = "__float_as_uint(__fadd_rn(clipped, 8388608.0f))"
HALF_UP = "(unsigned)std::floor(clipped + 0.5f)"

MUTANTS = [
    Mutant("quantize_token", "no barrier before packing", *BARRIER),
    Mutant("quantize_token", "halves rounded up", HALF_EVEN, HALF_UP),
    Mutant("quantize_token", "truncated", HALF_EVEN, "(unsigned)clipped"),
    Mutant("quantize_token", "the next channel", "+ lane * SIZE;", "+ lane * SIZE + 1;"),
    Mutant("quantize_token", "a shuffle less", "mask = team / 2", "mask = team / 4"),
    Mutant("quantize_token", "not all lanes shuffle", "if (left[u] > 0) range.widen", "if (left[u] <= 0) continue; range.widen"),
    Mutant("quantize_token", "ragged group one short", "? n - channel[u] : 0", "? n - 1 - channel[u] : 0"),
    Mutant("quantize_token", "ragged group one long", "i < count ? load(pointer + i) : first", "i <= count ? load(pointer + i) : first"),
    Mutant("quantize_token", "rows of a tile one short", "row[u] < count ?", "row[u] < count - 1 ?"),
    Mutant("quantize_token", "tiny ends kept", "fabsf(x) < TINY ? 0.0f : x", "x"),
    Mutant("quantize_token", "tiny ranges scaled", "extent < TINY ? 0.0f", "extent <= 0.0f ? 0.0f"),
    Mutant("quantize_token", "reciprocal of the extent", "__fdiv_rn((float)((1 << BITS) - 1), extent)", "__fmul_rn((float)((1 << BITS) - 1), __fdiv_rn(1.0f, extent))"),
    Mutant("quantize_token", "contracted", "__fmul_rn(__fsub_rn(x, lower), inverse)", "__fmaf_rn(x, inverse, -__fmul_rn(lower, inverse))"),
    Mutant("quantize_token", "planes swapped", "(codes >> SHIFT) & MASK", "(codes >> (3 - SHIFT - WIDTH)) & MASK"),
    Mutant("quantize_token", "padding not zero", "if (i * size < left) out", "out"),
    Mutant("quantize_channel", "no barrier before the ends", *BARRIER, which=0),
    Mutant("quantize_channel", "no barrier before the codes", *BARRIER, which=1),
    Mutant("quantize_channel", "no barrier before packing", *BARRIER, which=2),
    Mutant("quantize_channel", "no barrier before the next codes", *BARRIER, which=3),
    Mutant("quantize_channel", "a lane left out", "k < lanes; ++k", "k < lanes - 1; ++k"),
    Mutant("quantize_channel", "last token left out", "if (k * LANES + lane < count) range.widen", "if (k * LANES + lane < count - 1) range.widen"),
    Mutant("quantize_channel", "ends of the neighbour", "start + channel, inverse + channel, 1,", "start + channel, inverse + channel + 1, 1,"),
    Mutant("quantize_channel", "a barrier that not all reach", "int c = threadIdx.x; c < n; c += blockDim.x) {", "int c = threadIdx.x; c < n; c += blockDim.x) { if (c == 0) __syncthreads();"),
    Mutant("dequantize", "the last row left out", "if (row >= rows) break;", "if (row >= rows - 1) break;"),
    Mutant("dequantize", "a row too many", "if (row >= rows) break;", "if (row > rows) break;"),
    Mutant("dequantize", "ends of the next group", "? tile : 0", "? tile + (tile + 1 < tiles) : 0"),
    Mutant("dequantize", "the step is a quotient", "__fmul_rn(__fsub_rn(to_float(load(upper + end)), start[i]), SCALE)", "__fdiv_rn(__fsub_rn(to_float(load(upper + end)), start[i]), (float)((1 << BITS) - 1))"),
    Mutant("clip_token", "no barrier after the table", *BARRIER),
    Mutant("clip_token", "no row for what is absent", "(ABSENT + 1) * 8", "ABSENT * 8"),
    Mutant("clip_token", "what is absent counts", "if (!present(i)) place = absent;", ""),
    Mutant("clip_token", "errors of the next code", "ROW_BYTES + first;", "ROW_BYTES + first + ROW_BYTES;"),
    Mutant("clip_token", "the partner left out", "mine[i] + __shfl_xor_sync(0xffffffffu, given[i], STRIDE)", "mine[i]"),
    Mutant("clip_token", "the halves swapped", "pair = 8 * (slot & 1)", "pair = 8 * (~slot & 1)"),
    Mutant("clip_token", "sums of 15 bits", "both >> 16", "(both >> 16 & 0x7fffu)"),
    Mutant("clip_token", "the last of equals", "sums[i] * 16 + pair + i)", "(sums[i] - 1) * 16 + pair + i)"),
    Mutant("clip_token", "the best of some lanes", "mask < TEAM * STRIDE; mask *= 2)\n            best", "mask < TEAM * STRIDE / 2; mask *= 2)\n            best"),
    Mutant("clip_token", "the two cuts swapped", "low = best / 4 % 4, high = best % 4", "high = best / 4 % 4, low = best % 4"),
    Mutant("clip_token", "cuts in one step", "if (low >= i) lower = __fadd_rn(lower, sixteenth);", "if (low == i) lower = __fmaf_rn(sixteenth, (float)i, lower);"),
    Mutant("clip_token", "tiny ends kept", "fabsf(x) < TINY ? 0.0f : x", "x"),
    Mutant("clip_token", "the second run counts as the first", "(i < 4 ? i : APART + i - 4) < left", "i % 4 < left"),
    Mutant("clip_token", "rows of a tile one short", "row < count ? n - channel : 0", "row < count - 1 ? n - channel : 0"),
    Mutant("clip_token", "the second run for the first", "channel + at + q * APART), clipped", "channel + at + (1 - q) * APART), clipped"),
    Mutant("clip_token", "a run that ends too late", "if (i < count) store(out + i, x[i]);", "store(out + i, x[i]);"),
    Mutant("clip_channel", "no barrier after the table", *BARRIER),
    Mutant("clip_channel", "sums of 15 bits", "both >> 16", "(both >> 16 & 0x7fffu)"),
    Mutant("clip_channel", "partners of one half", "lane % 8 ^ (lane / STRIDE & 1)", "lane % 8"),
    Mutant("clip_channel", "the last token left out", "token + i * TEAM < members", "token + i * TEAM < members - 1"),
    Mutant("clip_channel", "the last token not stored", "if (row >= members) break;", "if (row >= members - 1) break;"),
    Mutant("clip_channel", "tokens of another group", "min(token + i * TEAM, members - 1)", "token + i * TEAM"),
    Mutant("clip_channel", "ends of the neighbour", "lower[c + k], upper[c + k]", "lower[c + k], upper[c]"),
    Mutant("clip_channel", "the last unit left out", "min(start + tile_units, units)", "min(start + tile_units, units - 1)"),
    Mutant("clip_channel", "ends of some tokens", "mask < 32; mask *= 2", "mask < 16; mask *= 2"),
    Mutant("quantize_rotated", "no barrier after the tables", *BARRIER, which=0),
    Mutant("quantize_rotated", "no barrier before packing", *BARRIER, which=1),
    Mutant("quantize_rotated", "a sign ignored", "(minus << i & W::SIGN)", "(minus << i & W::SIGN & 0x7fffffffu)"),
    Mutant("quantize_rotated", "the tile of the last turn again", "source[start + (row", "source[(row"),
    Mutant("quantize_rotated", "rounds in another order", "int bit = SIZE; bit < HELD; bit *= 2", "int bit = HELD / 2; bit >= SIZE; bit /= 2"),
    Mutant("quantize_rotated", "the rounded root alone", "__fmul_rn(__fadd_rn(root, __fdiv_rn(x, root)), 0.5f)", "root"),
    Mutant("quantize_rotated", "products not rounded first", "__fmaf_rn(__fmul_rn(x, y), UNIT, shift)", "__fmaf_rn(x, y * UNIT, shift)"),
    Mutant("quantize_rotated", "the code of the next step", "cell >> (Q::SHIFT - 2)", "(cell + (1u << Q::SHIFT)) >> (Q::SHIFT - 2)"),
    Mutant("quantize_rotated", "cells rounded to the nearest", "__fmaf_rd(", "__fmaf_rn("),
    Mutant("dequantize_rotated", "no barrier after the levels", *BARRIER),
    Mutant("dequantize_rotated", "halves of a warp swapped", "lane & bit ? -1.0f : 1.0f", "lane & bit ? 1.0f : -1.0f"),
    Mutant("dequantize_rotated", "a sign ignored", "& Word<T>::SIGN;", "& Word<T>::SIGN & 0x7fffffffu;"),
    Mutant("quantize_allocated", "no barrier before packing", *BARRIER, which=-1),
    Mutant("quantize_allocated", "places reversed", ">> owner % DEEPEST & 1u", ">> (DEEPEST - 1 - owner % DEEPEST) & 1u"),
    Mutant("quantize_allocated", "depth of the first", "depth[component + j])", "depth[component])"),
    Mutant("dequantize_allocated", "no barrier after the places", *BARRIER, which=-1),
    Mutant("dequantize_allocated", "the bit of the next byte", "bit - part * bytes]", "bit - part * bytes + 1]"),
    Mutant("within", "limits of one value", "left &=", "left ="),
    Mutant("within", "signs kept", "(vector.words[j] & ~SIGN)", "vector.words[j]"),
    Mutant("within", "the last row left out", "i < count * vectors", "i < count * vectors - 1"),
    Mutant("within", "slots of the first tile", "slots + start + row", "slots + row"),
    Mutant("gather_slots", "slots of the first tile", "load(slots + first + token)", "load(slots + token)"),
    Mutant("gather_slots", "heads swapped", "rest - head * words);", "rest - head * words + 1);"),
    Mutant("gather_slots", "the last token left out", "i < count * size", "i < (count - 1) * size"),
    Mutant("scatter_slots", "slots of the first tile", "load(slots + first + token)", "load(slots + token)"),
    Mutant("scatter_slots", "a token for a slot", "to.at(head, slot, word)", "to.at(head, token, word)"),
    Mutant("nearest", "no barrier after the half norms", *BARRIER, which=2),
    Mutant("nearest", "no barrier before the half norms", *BARRIER, which=1),
    Mutant("nearest", "no barrier before the next codes", *BARRIER, which=0),
    Mutant("nearest", "the last of equals", "if (score < least[v])", "if (score <= least[v])"),
    Mutant("nearest", "the last code left out", "code < codes; ++code", "code < codes - 1; ++code"),
]  # fmt: skip


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


def affine(backend, family):
    axis = "channel" if family == "quantize_channel" else "token"
    for n, seed in ((128, 0), (100, 1), (71, 2)):
        shape = (2, n, 290) if axis == "channel" else (2, 290, n)
        x = hard.values(shape, "float32", bits=3, seed=seed)
        if axis == "channel":
            x = np.ascontiguousarray(np.swapaxes(x, 1, 2))
        for size in (64, 290):
            spec = AffineSpec(3, size, axis)
            same(backend.quantize(x, spec=spec), ops.quantize(x, spec=spec))


def clipping(backend, family):
    axis = "channel" if family == "clip_channel" else "token"
    for n, seed in ((128, 0), (100, 1), (71, 2)):
        shape = (2, n, 290) if axis == "channel" else (2, 290, n)
        x = hard.values(shape, "float32", bits=2, seed=seed)
        if axis == "channel":
            x = np.ascontiguousarray(np.swapaxes(x, 1, 2))
        x[abs(x) < 2.0**-126] = 0  # and of zeros either will do
        for size in (64, 290):
            spec = AffineSpec(2, size, axis)
            got, expected = backend.clip_groups(x, spec=spec), ops.clip_groups(x, spec=spec)
            np.testing.assert_array_equal(got, expected)
    x = hard.crowded(64)
    x = np.ascontiguousarray(x.T if axis == "channel" else x)[None]
    spec = AffineSpec(2, 64, axis)
    same([backend.clip_groups(x, spec=spec)], [ops.clip_groups(x, spec=spec)])


def dequantize(backend, _):
    for n in (128, 7):
        spec = AffineSpec(3, 64, "channel")
        x = hard.values((2, 272, n), "float32", bits=3, seed=n)
        encoded, static = ops.quantize(x, spec=spec), {"spec": spec, "channels": n}
        same([backend.dequantize(*encoded, **static)], [ops.dequantize(*encoded, **static)])


def rotated(backend, _):
    spec = RotatedSpec(3, 0)
    x = np.random.default_rng(0).standard_normal((3, 700, 128)).astype("float16")
    same(backend.quantize_rotated(x, spec=spec), ops.quantize_rotated(x, spec=spec))


def dequantize_rotated(backend, _):
    spec = RotatedSpec(3, 0)
    x = np.random.default_rng(0).standard_normal((3, 70, 128)).astype("float16")
    encoded, static = ops.quantize_rotated(x, spec=spec), {"spec": spec, "channels": 128}
    same(
        [backend.dequantize_rotated(*encoded, **static)],
        [ops.dequantize_rotated(*encoded, **static)],
    )


def pools(backend, family):
    """Several tiles of tokens; what is no token is not a number."""
    tokens, heads, n = 1700, 3, 40
    rng = np.random.default_rng(0)
    slots = rng.permutation(tokens + 9)[:tokens].astype("int32")
    x = rng.standard_normal((heads, tokens, n)).astype("float16")
    pool = np.full((tokens + 9, heads, n), np.nan, "float16")
    pool[slots] = np.swapaxes(x, 0, 1)
    if family == "gather_slots":
        same([backend.gather_slots(pool, slots)], [x])
    elif family == "scatter_slots":
        target = np.zeros_like(pool)
        expected = ops.scatter_slots(target.copy(), slots, x)
        same([backend.scatter_slots(target, slots, x)], [expected])
    else:
        limit = float(np.max(np.abs(x)))
        assert backend.within_paged(pool, slots, limit=limit)
        for where in (0, x.size // 2, x.size - 1):
            for worse in (-np.nan, np.nan, -np.inf, limit * 2):
                y = x.copy()
                y.reshape(-1)[where] = worse
                assert not backend.within(y, limit=limit)
                pool[slots] = np.swapaxes(y, 0, 1)
                assert not backend.within_paged(pool, slots, limit=limit)


def allocated(backend, family):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 700, 32)).astype("float32")
    depths = ops.allocate(rng.random((2, 32), "float32"), 75)
    codes = ops.quantize_allocated(x, depths, bits=75)
    if family == "quantize_allocated":
        same([backend.quantize_allocated(x, depths, bits=75)], [codes])
    else:
        levels = ops.dequantize_allocated(codes, depths, bits=75)
        same([backend.dequantize_allocated(codes, depths, bits=75)], [levels])


def nearest(backend, _):
    """Centroids far from each other: no near ties."""
    rng = np.random.default_rng(0)
    codebook = rng.permutation(700).astype("float32")[:, None] * np.ones(4, "float32")
    codebook[1::7] = codebook[:100]
    x = codebook[rng.permutation(700)]
    same([backend.nearest(x, codebook)], [ops.nearest(x, codebook)])


# Check and the instantiations that it needs.
CHECKS = {
    "quantize_token": (affine, (3, 64, "float"), (3, 128, "float")),
    "quantize_channel": (affine, (3, 64, "float"), (3, 0, "float")),
    "clip_token": (clipping, (64, "float"), (128, "float")),
    "clip_channel": (clipping, (64, "float"), (0, "float")),
    "dequantize": (dequantize, (3, 64, 0, "float")),
    "quantize_rotated": (rotated, (3, 128, "Float16")),
    "dequantize_rotated": (dequantize_rotated, (3, 128, "float")),
    "quantize_allocated": (allocated, (4,)),
    "dequantize_allocated": (allocated, (4,)),
    "within": (pools, ("Float16",)),
    "gather_slots": (pools, ("uint4",)),
    "scatter_slots": (pools, ("uint4",)),
    "nearest": (nearest, (4,)),
}


@pytest.fixture(autouse=True)
def blocks_take_turns(monkeypatch):
    monkeypatch.setattr("kvcompress_cupy.launches.layout.MANY", 4)
    rotated_launches.quantize_rotated.cache_clear()
    clipping_launches.clip_token.cache_clear()
    clipping_launches.clip_channel.cache_clear()


def run(family, directory, mutate):
    check, *instantiations = CHECKS[family]
    # Optimized as little as possible: what is planted shall run as it stands, and compile soon.
    names = tuple(name(family, *parameters) for parameters in instantiations)
    kernels = build(family, directory, names=names, mutate=mutate, optimize=False)
    check(EmulatedBackend({family: kernels}.__getitem__), family)


@pytest.mark.parametrize("family", CHECKS)
def test_the_checks_pass_without_a_fault(family, tmp_path):
    run(family, tmp_path, str)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_found(mutant, tmp_path):
    planted = mutant(source(mutant.family))  # or a stale mutant would count as found
    with pytest.raises((AssertionError, EmulationError)):
        run(mutant.family, tmp_path, lambda _: planted)
