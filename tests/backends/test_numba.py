"""The Numba kernels do what the generic operations do, bit for bit where codes are concerned."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcompress import GroupQuantization, KVCacheCompressor, VectorQuantization, ops
from kvcompress.backend import select
from kvcompress.errors import BackendError, NonFiniteError
from kvcompress.ops import AffineSpec, RotatedSpec
from kvcompress.testing import conformance
from kvcompress.testing.strategies import compressors, kv, kv_shapes, tensors

numba = pytest.importorskip("numba")
pytestmark = pytest.mark.library("numpy")

import kvcompress_numba  # noqa: E402
from kvcompress_numba import backend, threads  # noqa: E402

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
names = st.sampled_from(list(DTYPES))
sizes = st.sampled_from((1, 2, 3, 15, 16, 17, 31, 48, 64, 96, 128, 144, 256))


def same(a, b):
    assert type(a) is type(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    bits = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
    )


def both(op, *arrays, **static):
    """Results of the kernel, which must be those of the generic operation."""
    assert backend.supports(op, *arrays, **static)
    got, expected = getattr(backend, op)(*arrays, **static), getattr(ops, op)(*arrays, **static)
    if isinstance(got, tuple):
        for a, b in zip(got, expected, strict=True):
            same(a, b)
    else:
        same(got, expected)
    return got


@pytest.mark.parametrize("op", ["quantize", "dequantize", "rotated", "others"])
def test_conforms(op):
    taken = 0
    for case in conformance.cases():
        kind = "rotated" if case.op.endswith("rotated") else case.op
        if op == (kind if kind in ("quantize", "dequantize", "rotated") else "others"):
            taken += conformance.check(backend, case)
    assert taken > 30


def test_memory_that_others_left_dirty(monkeypatch):
    """Neither scratch nor results depend on what new arrays hold."""
    clean = np.empty

    def dirty(shape, dtype=float, **options):
        x = clean(shape, dtype, **options)
        x.reshape(-1).view("uint8")[:] = 0xA5
        return x

    cases = list(conformance.cases())
    monkeypatch.setattr(np, "empty", dirty)
    assert sum(conformance.check(backend, case) for case in cases) > 300
    rng = np.random.default_rng(0)
    for bits in range(1, 48):
        component_bits = ops.allocate(rng.random((2, 6), "float32"), bits)
        packed = both(
            "quantize_allocated", rng.random((2, 9, 6), "float32"), component_bits, bits=bits
        )
        both("dequantize_allocated", packed, component_bits, bits=bits)


@given(data=st.data())
def test_affine(data):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 140), sizes))
    dtype, narrow = data.draw(names), data.draw(names)
    group_size = data.draw(st.sampled_from((1, 2, 7, 16, 24, 32, 64, 100, 128, 2**20)))
    axis = data.draw(st.sampled_from(("channel", "token")))
    spec = AffineSpec(data.draw(st.integers(1, 8)), group_size, axis)
    x = data.draw(tensors(shape, dtype))
    encoded = both("quantize", x, spec=spec)
    both("dequantize", *encoded, spec=spec, channels=shape[-1], dtype=narrow)
    if spec.bits < 4:
        np.testing.assert_array_equal(
            backend.clip_groups(x, spec=spec), ops.clip_groups(x, spec=spec)
        )


@given(data=st.data())
def test_rotated(data):
    channels = 2 ** data.draw(st.integers(0, 10))
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.just(channels)))
    spec = RotatedSpec(data.draw(st.integers(1, 8)), data.draw(st.integers(0, 9)))
    x = data.draw(tensors(shape, data.draw(names)))
    codes, gain = both("quantize_rotated", x, spec=spec)
    gain = gain.astype(DTYPES[data.draw(st.sampled_from(("float32", "bfloat16")))])
    static = {"spec": spec, "channels": channels, "dtype": data.draw(names)}
    both("dequantize_rotated", codes, gain, **static)


def test_tokens_that_random_numbers_do_not_make():
    """Tiny ones, ones that rotation gathers in one channel, and gains at the limit."""
    spike = np.zeros((4, 16), "float32")
    spike[:, 3] = [9, -9, 2.0**-110, -(2.0**-110)]
    for channels in (8, 256):
        x = np.zeros((4, channels), "float32")
        x[:, :8] = spike[:, :8]
        gathered = ops.inverse_hadamard(x, seed=0)
        for bits in (4, 5):
            spec = RotatedSpec(bits, 0)
            for tokens in (x, gathered):
                codes, gain = both("quantize_rotated", tokens, spec=spec)
                limit = np.full_like(gain, 2.0**127 / channels**0.5)
                both("dequantize_rotated", codes, limit, spec=spec, channels=channels)


@pytest.mark.parametrize("place", range(35))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_anywhere(place, bad):
    x = np.ones((1, 1, 35), "float32")
    x[..., place] = bad
    assert not backend.within(x, limit=2.0)


@given(st.data(), names)
def test_ranges_stored_narrower_than_the_source(data, range_dtype):
    spec = AffineSpec(4, 16, data.draw(st.sampled_from(("channel", "token"))), range_dtype)
    x = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((2, 40, 33)) * 9
    both("quantize", x.astype("float32"), spec=spec)


@given(data=st.data())
def test_cast(data):
    dtype, other = data.draw(st.lists(names, min_size=2, max_size=2, unique=True))
    x = data.draw(tensors(data.draw(st.tuples(st.integers(0, 3), st.integers(0, 9), sizes)), dtype))
    if x.size:
        with np.errstate(over="ignore"):
            x.reshape(-1)[-1] = data.draw(st.sampled_from([1e5, -1e5, np.inf, 1e-7, 2.0**-120]))
    both("cast", x, dtype=other)


@given(data=st.data())
def test_within(data):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 9), sizes))
    x = data.draw(tensors(shape, data.draw(names)))
    limit = float(abs(data.draw(st.sampled_from(x.reshape(-1)[:9]))) if x.size else 1.0)
    both("within", x, limit=limit)
    if x.size:
        x.reshape(-1)[data.draw(st.integers(0, x.size - 1))] = data.draw(
            st.sampled_from((np.nan, np.inf, -np.inf))
        )
        assert not both("within", x, limit=limit)


@pytest.mark.parametrize("dim", [1, 4, 64])
@pytest.mark.parametrize("size", [2, 16, 17, 100, 3000])
def test_nearest_centroids(dim, size):
    """As near as the nearest, in float64; the first of those that are the same."""
    rng = np.random.default_rng(0)
    x, codebook = (rng.standard_normal((n, dim)).astype("float32") for n in (500, size))
    codebook[-1] = codebook[0]
    codes = backend.nearest(x, codebook)
    assert codes.dtype == np.int32
    distance = np.square(x[:, None].astype("float64") - codebook).sum(-1)
    excess = distance[np.arange(500), codes] - distance.min(-1)
    magnitude = (abs(x) @ abs(codebook).T).max(-1) + np.square(codebook).sum(-1).max()
    assert (excess <= 4 * (dim + 2) * 2.0**-24 * magnitude).all()
    assert (codes != size - 1).all()


def test_product_codes():
    rng = np.random.default_rng(0)
    books = [rng.standard_normal((3, 256, dim), dtype="float32") for dim in (1, 3, 16, 2)]
    x = rng.standard_normal((3, 400, 22), dtype="float32")
    codes = backend.encode_product(x, *books)
    assert (codes.dtype, codes.shape) == (np.uint8, (3, 400, 4))
    assert np.mean(codes == ops.encode_product(x, *books)) > 0.999
    both("decode_product", codes, *books)


@given(data=st.data())
def test_allocated(data):
    heads, channels = data.draw(st.integers(0, 3)), data.draw(sizes)
    shape = heads, data.draw(st.integers(0, 40)), channels
    bits = data.draw(st.integers(1, 8 * channels))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    component_bits = ops.allocate(
        rng.exponential(size=(heads, channels)).astype("float32") ** 3, bits
    )
    # Some lie beyond the outermost levels, some on the edge of a cell.
    x = np.round(3 * rng.standard_normal(shape), 2).astype("float32")
    packed = both("quantize_allocated", x, component_bits, bits=bits)
    both("dequantize_allocated", packed, component_bits, bits=bits)
    both(
        "quantize_allocated",
        np.concatenate([x, x], axis=-1)[..., :channels],
        component_bits,
        bits=bits,
    )


@pytest.mark.parametrize("depth", [3, 9, 200, 255])
def test_component_bits_of_damaged_files_write_nowhere_else(depth, monkeypatch):
    """As if no depth exceeded 8, and those beyond the bits there are were 0."""
    component_bits, fit = np.full((2, 16), depth, "uint8"), np.zeros((2, 16), "uint8")
    for i in range(16):
        fit[:, i] = min(depth, 8, 20 - fit[0].sum())
    x = np.random.default_rng(0).standard_normal((2, 50, 16), "float32")
    clean, memory = np.empty, []

    def guarded(shape, dtype=float, **_):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory.append((size, np.full(size + 512, 0xA5, "uint8")))
        return memory[-1][1][:size].view(dtype).reshape(shape)

    monkeypatch.setattr(np, "empty", guarded)
    packed = backend.quantize_allocated(x, component_bits, bits=20)
    decoded = backend.dequantize_allocated(packed, component_bits, bits=20)
    monkeypatch.setattr(np, "empty", clean)
    assert len(memory) >= 4
    assert all((room[size:] == 0xA5).all() for size, room in memory)
    same(packed, ops.quantize_allocated(x, fit, bits=20))
    same(decoded, ops.dequantize_allocated(packed, fit, bits=20))


LAYOUTS = {
    "sliced tokens": lambda x: x[:, 3:-5, :],
    "transposed": lambda x: np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
    "every other token": lambda x: x[:, ::2, :],
    "reversed tokens": lambda x: x[:, ::-1, :],
    "every other channel": lambda x: x[..., ::2],
    "reversed channels": lambda x: x[..., ::-1],
    "one token for all": lambda x: np.broadcast_to(x[:, :1, :], x.shape),
    "Fortran": np.asfortranarray,
    "a batch": lambda x: x.reshape(2, 2, *x.shape[1:])[:, ::-1],
    "one head": lambda x: x[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x = LAYOUTS[layout](np.random.default_rng(0).standard_normal((4, 90, 64), dtype="float32"))
    x.flags.writeable = False
    for axis in ("channel", "token"):
        spec = AffineSpec(4, 32, axis)
        codes, minimum, maximum = both("quantize", x, spec=spec)
        ranges = np.concatenate([minimum, maximum], axis=-1)
        ranges = ranges[..., : minimum.shape[-1]], ranges[..., minimum.shape[-1] :]
        codes = np.concatenate([codes, codes], axis=-2)[..., : codes.shape[-2], :]
        both("dequantize", codes, *ranges, spec=spec, channels=x.shape[-1])
        for other in (ranges[0], np.ascontiguousarray(maximum)):
            both("dequantize", codes, ranges[0].copy(), other, spec=spec, channels=x.shape[-1])
    spec = RotatedSpec(3, 0)
    encoded = both("quantize_rotated", x, spec=spec)
    both("dequantize_rotated", *encoded, spec=spec, channels=x.shape[-1])
    both("within", x, limit=2.0)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((1, 4, 8)),
        np.ones((1, 4, 8), "int32"),
        np.ones((1, 4, 8), ">f4"),
        np.frombuffer(b"\0" * 129, "float32", 32, offset=1).reshape(1, 4, 8),
        np.ma.ones((1, 4, 8), "float32"),
        [[1.0]],
    ],
)
def test_leaves_what_it_cannot_read(x):
    assert not backend.supports("quantize", x, spec=AffineSpec(4, 16, "token"))


def test_leaves_widths_on_which_libraries_differ():
    x = np.ones((1, 4, 96), "float32")
    assert not backend.supports("quantize_rotated", x, spec=RotatedSpec(4, 0))
    codes = np.ones((1, 4, 48), "uint8")
    static = {"spec": RotatedSpec(4, 0), "channels": 96}
    assert not backend.supports("dequantize_rotated", codes, x[..., :1], **static)


@given(data=st.data())
def test_compressed_is_the_same(data):
    """But for vectors as near to one centroid as to another."""
    shapes = data.draw(kv_shapes(head_dims=(1, 2, 8, 16, 24, 32)))
    k, v = data.draw(kv(st.just(shapes)))
    compressor = data.draw(compressors(k.shape[-1], v.shape[-1]))
    methods = compressor.method, compressor.value_method
    assume(not any(isinstance(method, VectorQuantization) for method in methods))
    generic, fast = (
        KVCacheCompressor(
            compressor.method, value_method=compressor.value_method, backend=name, window=3
        )
        for name in ("generic", "numba")
    )
    a, b = generic.compress_kv(k, v), fast.compress_kv(k, v)
    for part in ("keys", "values"):
        old, new = getattr(a, part), getattr(b, part)
        assert old.payload.keys() == new.payload.keys()
        for name in old.payload:
            same(old.payload[name], new.payload[name])
    for x, y in zip(generic.decompress_kv(a), fast.decompress_kv(b), strict=True):
        same(x, y)


def test_bad_values_are_found_by_the_kernel():
    x = np.ones((1, 2, 300, 64), "float16")
    x[0, 1, 299, 63] = np.inf
    compressor = KVCacheCompressor(GroupQuantization(4), backend="numba")
    with pytest.raises(NonFiniteError, match=r"index \[0, 1, 299, 63\]"):
        compressor.compress_kv(np.ones_like(x), x)


# Large enough that every call is shared out among threads.
LARGE = np.random.default_rng(0).standard_normal((3, 999, 128), dtype="float32")
CALLS = [
    ("quantize", (LARGE,), {"spec": AffineSpec(4, 64, "channel")}),
    ("quantize", (LARGE.astype("float16"),), {"spec": AffineSpec(3, 64, "token")}),
    ("quantize_rotated", (LARGE,), {"spec": RotatedSpec(4, 0)}),
    ("clip_groups", (LARGE,), {"spec": AffineSpec(2, 64, "token")}),
    ("within", (LARGE,), {"limit": 3.0}),
    ("nearest", (LARGE.reshape(-1, 4), LARGE.reshape(-1, 4)[:256]), {}),
]


@pytest.fixture
def three_threads(monkeypatch):
    """However many processors there are; and a pool of its own."""
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 3)
    threads._pool.cache_clear()
    yield
    threads._pool.cache_clear()


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("op", "arrays", "static"), CALLS)
def test_threads_share_the_work(op, arrays, static):
    both(op, *arrays, **static)
    assert threads._pool.cache_info().currsize == 1


@pytest.mark.usefixtures("three_threads")
def test_slow_threads_are_waited_for():
    def fill(out, _, begin, end):
        time.sleep(0.1 * (begin > 0))
        out[begin:end] = 1

    out = np.zeros(9)
    threads.run(fill, 9, threads.WORTH_A_THREAD, 0, out)
    assert out.all()


@pytest.mark.usefixtures("three_threads")
def test_several_threads_at_once():
    def call(i):
        op, arrays, static = CALLS[i % len(CALLS)]
        return both(op, *arrays, **static)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(call, range(40)))) == 40


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("three_threads")
def test_a_fork_has_threads_of_its_own():
    call = partial(both, CALLS[0][0], *CALLS[0][1], **CALLS[0][2])
    call()
    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_second_process_compiles_nothing(tmp_path):
    program = (
        "import numpy as np, kvcompress_numba.affine as a\n"
        "from kvcompress.ops import AffineSpec\n"
        "a.quantize(np.ones((1, 4, 8), 'float32'), spec=AffineSpec(4, 16, 'token'))\n"
        "print(*a._quantize_tokens.stats.cache_hits.values())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for _ in range(2)
    )
    assert (first, second) == ("", "1")


def test_without_numba(monkeypatch):
    monkeypatch.setattr(kvcompress_numba, "find_spec", lambda _: None)
    assert not backend.available()


def test_without_conversions_of_float16(monkeypatch):
    monkeypatch.setattr(threads, "has_half_floats", lambda: False)
    assert not backend.available()


def test_what_keeps_numba_from_loading_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvcompress_numba.affine", None)
    monkeypatch.delattr(kvcompress_numba, "affine")
    with pytest.raises(BackendError, match=r"'numba' failed to load: .*affine"):
        select("numba")


@pytest.mark.parametrize(
    ("axis", "shape"), [("channel", (1, 2**16 + 1, 2)), ("token", (1, 2, 2**16 + 1))]
)
def test_groups_too_long_to_add_up_errors_are_left_alone(axis, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    assert not backend.supports("clip_groups", x, spec=AffineSpec(2, 2**17, axis))
    both("clip_groups", x, spec=AffineSpec(2, 2**16, axis))
