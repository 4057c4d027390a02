"""The CUDA kernels, emulated, give the bits of the generic operations."""

from __future__ import annotations

import itertools

import hard
import numpy as np
import pytest
from emulation import EmulatedRuntime, EmulationError
from kvcompress_cupy import tables
from kvcompress_cupy.launches import affine, clipping, codebooks, layout, rotated
from kvcompress_cupy.operations import Operations
from kvcompress_cupy.sources import DIMS, FAMILIES

from kvcompress import ops
from kvcompress.arrays import FLOATING, dtype_of, namespace_of
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells
from kvcompress.ops.packing import CODE_BITS
from kvcompress.ops.rotated import RotatedSpec, _sqrt
from kvcompress.testing import conformance

pytestmark = pytest.mark.xdist_group("built")  # in one process: the kernels are built once

AXES = ("channel", "token")
# Odd and ragged, whole groups and vectors, and rows for which one block is too short.
CHANNELS = (1, 5, 64, 80, 100, 128, 130, 256)
VALUES = 2**19  # of every dtype, number of bits and axis: 12.6 M in all


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.array_equal(bits_of(a), bits_of(b))


def bits_of(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def test_conformance(backend):
    taken = conformance.check_backend(backend)
    assert set(taken) >= {"quantize", "dequantize", "nearest", "lookup"}


@pytest.mark.parametrize(("dtype", "bits"), [*itertools.product(FLOATING, CODE_BITS)])
def test_affine(backend, monkeypatch, dtype, bits):
    monkeypatch.setattr("kvcompress_cupy.launches.layout.MANY", 4)  # blocks take turns
    affine.dequantize.cache_clear()
    cases = [*itertools.product(AXES, (32, 64, 128, None), CHANNELS)]
    for seed, (axis, group_size, n) in enumerate(cases):
        tokens = -(-VALUES * len(AXES) // (len(cases) * 3 * n))
        length = tokens if axis == "channel" else n
        spec = AffineSpec(bits, group_size or length, axis)
        shape = (3, n, tokens) if axis == "channel" else (3, tokens, n)
        x = hard.values(shape, dtype, bits=bits, seed=seed)
        if axis == "channel":
            x = np.ascontiguousarray(np.swapaxes(x, 1, 2))
        assert backend.supports("quantize", x, spec=spec)
        codes, minimum, maximum = expected = ops.quantize(x, spec=spec)
        for backend.runtime.flush in (True, False):
            same(backend.quantize(x, spec=spec), expected)
        static = {"spec": spec, "channels": n}
        decoded = ops.dequantize(codes, minimum, maximum, **static)
        same([backend.dequantize(codes, minimum, maximum, **static)], [decoded])
        short = backend.dequantize(codes, minimum, maximum, **static, dtype=dtype)
        same([short], [ops.cast(decoded, dtype=dtype)])
    assert backend.runtime.copies == 0


@pytest.mark.parametrize("dtype", FLOATING)
def test_affine_of_wide_rows(backend, dtype):
    """Groups along the tokens of more channels than a block holds in registers."""
    for n, tokens, size in itertools.product((257, 512, 1024), (1, 70, 300), (32, 64, 128, 300)):
        x = hard.values((2, tokens, n), dtype, bits=3, seed=n + tokens)
        spec = AffineSpec(3 if n % 2 else 4, size, "channel")
        assert backend.supports("quantize", x, spec=spec)
        same(backend.quantize(x, spec=spec), ops.quantize(x, spec=spec))


def alike(got, expected):
    """The same numbers; of zeros either, and no denormals, which some flush."""
    same(*([np.where(abs(x) < 2.0**-126, np.float32(0), x)] for x in (got, expected)))


@pytest.mark.parametrize(("dtype", "bits"), [*itertools.product(FLOATING, (2, 3, 5, 8))])
def test_clip_groups(backend, monkeypatch, dtype, bits):
    monkeypatch.setattr("kvcompress_cupy.launches.layout.MANY", 4)  # blocks take turns
    clipping.clip_token.cache_clear()
    clipping.clip_channel.cache_clear()
    cases = [*itertools.product(AXES, (32, 64, 128, None), CHANNELS)]
    for seed, (axis, group_size, n) in enumerate(cases):
        tokens = -(-VALUES * len(AXES) // (len(cases) * 3 * n))
        spec = AffineSpec(bits, group_size or (tokens if axis == "channel" else n), axis)
        shape = (3, n, tokens) if axis == "channel" else (3, tokens, n)
        x = hard.values(shape, dtype, bits=bits, seed=seed)
        if axis == "channel":
            x = np.ascontiguousarray(np.swapaxes(x, 1, 2))
        assert backend.supports("clip_groups", x, spec=spec)
        expected = ops.clip_groups(x, spec=spec)
        for backend.runtime.flush in (True, False):
            alike(backend.clip_groups(x, spec=spec), expected)
    assert backend.runtime.copies == 0


@pytest.mark.parametrize(("axis", "shape"), [("channel", (1, 2**16, 3)), ("token", (2, 3, 2**15))])
def test_the_longest_groups_that_are_clipped(backend, axis, shape):
    """The sums of their errors, too, are as large as can be."""
    spec = AffineSpec(2, 2**16, axis)
    x = np.random.default_rng(0).standard_normal(shape).astype("float16")
    for values in (x, np.sign(x), np.sign(x) * (abs(x) > 0.1)):
        assert backend.supports("clip_groups", values, spec=spec)
        alike(backend.clip_groups(values, spec=spec), ops.clip_groups(values, spec=spec))


@pytest.mark.parametrize(("axis", "group"), [*itertools.product(AXES, (32, 64, 128))])
def test_values_that_crowd_at_the_ends(backend, axis, group):
    """The sums of a thread, too, are as large as can be."""
    x = hard.crowded(group)
    x = x.T[None] if axis == "channel" else x[None]
    for dtype, bits in itertools.product(("float16", "float32"), (2, 3)):
        spec, values = AffineSpec(bits, group, axis), np.ascontiguousarray(x.astype(dtype))
        alike(backend.clip_groups(values, spec=spec), ops.clip_groups(values, spec=spec))


def test_errors_that_do_not_fit_are_no_table(monkeypatch):
    monkeypatch.setattr(tables, "CLIPPED_BITS", range(1, 9))
    with pytest.raises(ValueError, match="16 bits"):
        tables.all_errors_header()


@pytest.mark.parametrize("range_dtype", FLOATING)
def test_ranges_of_another_dtype(backend, range_dtype):
    for axis, n in itertools.product(AXES, (64, 5)):
        x = np.random.default_rng(0).standard_normal((2, 70, n)).astype("float32") * 100
        spec = AffineSpec(4, 32, axis, range_dtype)
        expected = ops.quantize(x, spec=spec)
        same(backend.quantize(x, spec=spec), expected)
        static = {"spec": spec, "channels": n}
        same([backend.dequantize(*expected, **static)], [ops.dequantize(*expected, **static)])
        alike(backend.clip_groups(x, spec=spec), ops.clip_groups(x, spec=spec))


@pytest.mark.parametrize(("dtype", "bits"), [*itertools.product(FLOATING, CODE_BITS)])
def test_rotated(backend, monkeypatch, dtype, bits):
    monkeypatch.setattr("kvcompress_cupy.launches.layout.MANY", 4)  # blocks take turns
    rotated.quantize_rotated.cache_clear()
    for dim, tokens in itertools.product(DIMS, (1, 683)):
        x = hard.values((2, tokens, dim), dtype, bits=bits, seed=dim)
        spec = RotatedSpec(bits, seed=dim)
        assert backend.supports("quantize_rotated", x, spec=spec)
        codes, gain = expected = ops.quantize_rotated(x, spec=spec)
        for backend.runtime.flush in (True, False):
            same(backend.quantize_rotated(x, spec=spec), expected)
        static = {"spec": spec, "channels": dim}
        for stored in (gain, ops.cast(gain, dtype=dtype)):
            decoded = ops.dequantize_rotated(codes, stored, **static)
            same([backend.dequantize_rotated(codes, stored, **static)], [decoded])
            short = backend.dequantize_rotated(codes, stored, **static, dtype=dtype)
            same([short], [ops.cast(decoded, dtype=dtype)])


def test_the_root_in_one_step_is_the_one_in_fourteen():
    """For all arguments that `quantize_rotated` has: multiples of 2**-22 up to 1, and some more."""
    x = np.arange(1, 2**22 + 2**16, dtype="float32") / 2**22
    root = np.sqrt(x)
    np.testing.assert_array_equal((root + x / root) / 2, _sqrt(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_steps_give_the_code_of_every_cell(bits):
    """Of those beyond the first and the last, too."""
    shift, table = tables.steps(bits)
    end = tables.BEYOND * CELLS_PER_UNIT
    cell = np.arange(-end, end)
    sums = (table[(cell >> shift) % len(table)].astype(int) + cell + tables.SHIFTED) % 2**32
    place = np.clip(cell + LARGEST * CELLS_PER_UNIT, 0, len(cells(bits)) - 1)
    np.testing.assert_array_equal(sums >> 24, cells(bits)[place])


def near(x, codebook, got, expected):
    """Where codes differ, their scores are as good as equal."""
    x, codebook = x.astype("float64"), codebook.astype("float64")
    half = (codebook**2).sum(-1) / 2
    rows = np.flatnonzero(got != expected)
    unit = (x.shape[-1] + 2) * 2.0**-24
    size = (abs(x[rows]) @ abs(codebook).T + half).max(-1, initial=0.0)
    score = half - x[rows] @ codebook.T
    row = np.arange(len(rows))
    apart = abs(score[row, got[rows]] - score[row, expected[rows]])
    assert np.all(apart <= 2 * unit * size)
    assert np.count_nonzero(apart) <= 2 + 1e-3 * len(x)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8, 16, 20, 32, 33, 100])
def test_nearest_and_lookup(backend, dim):
    rng = np.random.default_rng(dim)
    for vectors, size in ((1, 1), (2000, 256), (1030, 700)):
        x = rng.standard_normal((vectors, dim)).astype("float32")
        codebook = rng.standard_normal((size, dim)).astype("float32")
        codebook[size // 2] = codebook[0]
        codes = backend.nearest(x, codebook)
        assert codes.dtype == "int32"
        near(x, codebook, codes, ops.nearest(x, codebook))
        assert not np.any(codes == size // 2) or size == 1
        for dtype, kind in itertools.product(FLOATING, ("uint16", "int32", "int64")):
            book = codebook.astype(dtype_of(namespace_of(np), dtype))
            index = codes.astype(kind)
            same([backend.lookup(index, book)], [ops.lookup(index, book)])


@pytest.mark.parametrize(
    "dims", [(1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 40), (4,) * 32, (2, 6, 8), (128,), (1,) * 240]
)
def test_product(backend, dims):
    rng = np.random.default_rng(len(dims))
    for tokens in (1, 300):
        # A slice: rows do not follow each other.
        x = rng.standard_normal((2, tokens, sum(dims) + 3)).astype("float32")[..., : sum(dims)]
        codebooks = [rng.standard_normal((2, 256, dim)).astype("float32") for dim in dims]
        codes, expected = backend.encode_product(x, *codebooks), ops.encode_product(x, *codebooks)
        assert (codes.shape, codes.dtype) == (expected.shape, expected.dtype)
        edges = np.cumsum(dims)[:-1]
        for i, part in enumerate(np.split(x, edges, axis=-1)):
            for head in range(2):
                near(part[head], codebooks[i][head], codes[head, :, i], expected[head, :, i])
        same([backend.decode_product(codes, *codebooks)], [ops.decode_product(codes, *codebooks)])
    assert backend.runtime.copies == 0
    many = (x, *codebooks * 241)
    assert not backend.supports("encode_product", *many)


@pytest.mark.parametrize("n", [1, 5, 64, 128, 1000])
def test_allocated(backend, n):
    rng = np.random.default_rng(n)
    for tokens, bits in itertools.product((1, 300), (1, 3 * n + 1, 8 * n)):
        x = 2 * rng.standard_normal((3, tokens, n + 4)).astype("float32")[..., :n]
        edges = rng.integers(-6000, 6000, x.shape) / CELLS_PER_UNIT
        x = np.where(rng.random(x.shape) < 0.5, x, edges).astype("float32")
        x[0, 0, :1] = 1e30
        component_bits = ops.allocate(rng.random((3, n), "float32"), bits)
        assert backend.supports("quantize_allocated", x, component_bits, bits=bits)
        codes = ops.quantize_allocated(x, component_bits, bits=bits)
        same([backend.quantize_allocated(x, component_bits, bits=bits)], [codes])
        assert backend.supports("dequantize_allocated", codes, component_bits, bits=bits)
        levels = ops.dequantize_allocated(codes, component_bits, bits=bits)
        same([backend.dequantize_allocated(codes, component_bits, bits=bits)], [levels])
    assert backend.runtime.copies == 0


def test_allocated_of_many_tokens(backend):
    """As many as a block takes: its shared memory has to do for rows of any width."""
    for n in (1, 2, 3, 5, 9):
        x = np.random.default_rng(n).standard_normal((1, 20000, n)).astype("float32")
        component_bits = ops.allocate(np.ones((1, n), "float32"), 8 * n)
        codes = ops.quantize_allocated(x, component_bits, bits=8 * n)
        same([backend.quantize_allocated(x, component_bits, bits=8 * n)], [codes])
        levels = ops.dequantize_allocated(codes, component_bits, bits=8 * n)
        same([backend.dequantize_allocated(codes, component_bits, bits=8 * n)], [levels])


def layouts(x):
    """The values of `x` ``[2, 3, tokens, n]``, laid out in several ways; and copies it takes."""
    swapped = np.ascontiguousarray(np.swapaxes(x.reshape(6, *x.shape[2:]), 0, 1))
    yield np.swapaxes(swapped, 0, 1), 0  # [tokens, heads, n] underneath, as engines have it
    wide = np.zeros((*x.shape[:-1], x.shape[-1] + 8), x.dtype)
    wide[..., : x.shape[-1]] = x
    yield wide[..., : x.shape[-1]], 0  # vectors are aligned where they were
    odd = np.zeros(x.size + 1, x.dtype)
    odd[1:] = x.reshape(-1)
    yield odd[1:].reshape(x.shape), 0  # nothing is aligned
    yield x[:, :, ::-1].copy()[:, :, ::-1], 0  # backwards
    yield np.broadcast_to(x[:1, :1], x.shape), 0  # the same head again and again
    yield np.swapaxes(x, 2, 3).copy().swapaxes(2, 3), 1  # channels apart
    yield np.ascontiguousarray(np.moveaxis(x, 1, 2)).swapaxes(1, 2), 1  # two axes before the tokens


@pytest.mark.parametrize(("dtype", "n"), [*itertools.product(FLOATING, (64, 100, 3))])
def test_layouts(backend, dtype, n):
    x = hard.values((2, 3, 70, n), dtype, bits=4, seed=n)
    for axis, bits in itertools.product(AXES, (3, 4)):
        spec = AffineSpec(bits, 64, axis)
        for view, copies in layouts(x):
            before = view.copy()
            backend.runtime.copies = 0
            same(backend.quantize(view, spec=spec), ops.quantize(view, spec=spec))
            assert backend.runtime.copies == copies
            alike(backend.clip_groups(view, spec=spec), ops.clip_groups(view, spec=spec))
            assert backend.runtime.copies == 2 * copies
            same([view], [before])
    if n == 64:
        for view, copies in layouts(x):
            backend.runtime.copies = 0
            spec = RotatedSpec(3, 0)
            expected = ops.quantize_rotated(view, spec=spec)
            same(backend.quantize_rotated(view, spec=spec), expected)
            assert backend.runtime.copies == copies


@pytest.mark.parametrize("n", [64, 12, 5])
def test_layouts_of_codes(backend, n):
    x = hard.values((3, 70, n), "float16", bits=4, seed=n)
    for axis, bits in itertools.product(AXES, (3, 4)):
        spec = AffineSpec(bits, 32, axis)
        codes, minimum, maximum = ops.quantize(x, spec=spec)
        expected = ops.dequantize(codes, minimum, maximum, spec=spec, channels=n)
        # In one array, as `GroupQuantization` has them, of float32 as it decodes them.
        ranges = np.concatenate([minimum, maximum], axis=-1).astype("float32")
        halves = ranges[..., : minimum.shape[-1]], ranges[..., minimum.shape[-1] :]
        shifted = np.concatenate([codes[..., :1], codes], axis=-1)[..., 1:]
        for same_codes in (codes, shifted):
            got = backend.dequantize(same_codes, *halves, spec=spec, channels=n)
            same([got], [expected])
    assert backend.runtime.copies == 0


def test_what_no_kernel_takes(backend):
    x = np.zeros((2, 70, 64), "float16")
    assert not backend.supports("quantize", x, spec=AffineSpec(5, 64, "token"))
    assert not backend.supports("quantize", x, spec=AffineSpec(4, 48, "token"))
    assert not backend.supports("quantize", x.astype("float64"), spec=AffineSpec(4, 32, "token"))
    assert not backend.supports("quantize_rotated", x[..., :48], spec=RotatedSpec(4, 0))
    wide = np.zeros((1, 2, affine.COLUMNS + 1), "float16")
    assert not backend.supports("quantize", wide, spec=AffineSpec(4, 32, "channel"))
    assert backend.supports("quantize", wide, spec=AffineSpec(4, 32, "token"))
    assert not backend.supports("clip_groups", x, spec=AffineSpec(1, 64, "token"))
    assert not backend.supports("clip_groups", x, spec=AffineSpec(2, 48, "token"))
    assert not backend.supports("clip_groups", x.astype("float64"), spec=AffineSpec(2, 64, "token"))
    assert not backend.supports("clip_groups", x, spec=AffineSpec(2, 64, "token", "float64"))
    assert backend.supports("clip_groups", wide, spec=AffineSpec(2, 32, "channel"))
    long = np.broadcast_to(x[:, :1, :1], (2, 2**16 + 1, 1))
    assert not backend.supports("clip_groups", long, spec=AffineSpec(2, 2**17, "channel"))
    assert backend.supports("clip_groups", long, spec=AffineSpec(2, 64, "channel"))


def test_one_launch_for_all_layers_and_heads(backend):
    x = np.zeros((4, 2, 3, 70, 64), "float16")
    for axis in AXES:
        backend.quantize(x, spec=AffineSpec(4, 64, axis))
        backend.clip_groups(x, spec=AffineSpec(2, 64, axis))
    backend.quantize_rotated(x, spec=RotatedSpec(4, 0))
    assert len(backend.runtime.launches) == 5


class LastBlocks(EmulatedRuntime):
    """Runs the last two blocks of every launch; memory is only there where it is touched."""

    def empty(self, shape, dtype, like):
        out = np.zeros(shape, dtype_of(namespace_of(np), dtype))
        self._outputs.append(out)
        return out

    def launch(self, launch, *arrays, reached=(), changed=()):
        self.launches.append(launch)
        writable = sum(any(a is out for out in self._outputs) for a in arrays)
        kernels = self._kernels(launch.family)
        first = launch.grid - 2
        kernels(launch, *arrays, reached=reached, seed=1, writable=writable, first=first)


@pytest.mark.parametrize("axis", AXES)
def test_more_than_2_to_the_31_values(kernels, axis):
    heads, tokens, n = 3, 2**23, 128
    x = np.zeros((heads, tokens, n), "float16")
    x[-1, -64:] = hard.values((64, n), "float16", bits=4, seed=0)
    tail = x[-1:, -64:].copy()
    backend = Operations(LastBlocks(kernels.__getitem__))
    spec = AffineSpec(4, 64, axis)
    encoded = backend.quantize(x, spec=spec)
    expected = ops.quantize(tail, spec=spec)
    same([a[-1:, -b.shape[1] :] for a, b in zip(encoded, expected, strict=True)], expected)
    decoded = backend.dequantize(*encoded, spec=spec, channels=n, dtype="float16")
    static = {"spec": spec, "channels": n}
    want = ops.cast(ops.dequantize(*expected, **static), dtype="float16")[:, -8:]
    same([decoded[-1:, -8:]], [want])
    del decoded
    clipped = backend.clip_groups(x, spec=AffineSpec(2, 64, axis))
    alike(clipped[-1:, -64:], ops.clip_groups(tail, spec=AffineSpec(2, 64, axis)))
    del clipped
    if axis == "token":
        codes, gain = backend.quantize_rotated(x, spec=RotatedSpec(4, 0))
        expected = ops.quantize_rotated(tail, spec=RotatedSpec(4, 0))
        same([codes[-1:, -64:], gain[-1:, -64:]], expected)


def test_every_kernel_is_there(kernels):
    assert set(kernels) == set(FAMILIES)


def test_arguments_of_wrong_sizes_are_found(backend):
    launch = codebooks.lookup(1, row_bytes=4, word=4, size=1, code_bytes=4)
    array = np.zeros(4, "int32")
    wrong = layout.Launch(**{**vars(launch), "scalars": (*launch.scalars, np.int32(0))})
    with pytest.raises(EmulationError, match="other sizes"):
        backend.runtime.launch(wrong, array, array, array)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shared": layout.SHARED + 1}, "shared memory"),
        ({"block": 1025}, "threads"),
        ({"grid": 2**31}, "blocks"),
        ({"grid": 0}, "blocks"),
        ({"grid": np.int64(1)}, "blocks"),
        ({"scalars": (1,)}, "by value"),
        ({"scalars": (np.zeros(2, "int32"),)}, "by value"),
    ],
)
def test_what_a_gpu_would_not_launch_is_found(backend, changed, message):
    launch = codebooks.lookup(1, row_bytes=4, word=4, size=1, code_bytes=4)
    array, wrong = np.zeros(4, "int32"), layout.Launch(**{**vars(launch), **changed})
    with pytest.raises(EmulationError, match=message):
        backend.runtime.launch(wrong, array, array, array)
