"""PyTorch tensors on the kernels of the other backends."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import GroupQuantization, KVCacheCompressor, RotatedQuantization, ops
from kvcompress.arrays import to_host
from kvcompress.ops import AffineSpec, RotatedSpec
from kvcompress.testing import conformance
from kvcompress.testing.strategies import tensors

torch = pytest.importorskip("torch")
pytest.importorskip("numba")
pytestmark = pytest.mark.library("torch")

from kvcompress_torch import backend  # noqa: E402

SPEC = AffineSpec(4, 32, "token")


def asarray(x):
    x = np.array(x)
    if x.dtype.name == "bfloat16":
        return torch.asarray(x.view(np.int16)).view(torch.bfloat16)
    return torch.asarray(x)


def normal(*shape, dtype=None):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_conforms():
    taken = conformance.check_backend(backend, asarray=asarray)
    assert set(taken) >= {"quantize", "dequantize", "quantize_rotated", "dequantize_rotated"}


@given(data=st.data())
def test_codes_are_those_of_the_generic_operation(data):
    dtype = data.draw(st.sampled_from(("float32", "float16", "bfloat16")))
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from((5, 64))))
    spec = AffineSpec(
        data.draw(st.integers(1, 8)), 16, data.draw(st.sampled_from(("channel", "token")))
    )
    x = asarray(data.draw(tensors(shape, dtype)))
    assert backend.supports("quantize", x, spec=spec)
    got, expected = backend.quantize(x, spec=spec), ops.quantize(x, spec=spec)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        np.testing.assert_array_equal(to_host(a), to_host(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memory_is_shared(dtype):
    """A kernel reads and writes where the tensors lie."""
    from kvcompress_torch import bridge

    x = normal(4, 8).to(dtype)
    view = bridge._view(x)
    assert view.__array_interface__["data"][0] == x.data_ptr()
    back = bridge._tensor(view, x.device)
    assert (back.data_ptr(), back.dtype, back.shape) == (x.data_ptr(), dtype, x.shape)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: x[:, 3:50],
    "expanded": lambda x: x[:, :1].expand(-1, 90, -1),
    "every other channel": lambda x: x[..., ::2],
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout](normal(4, 90, 64))
    assert backend.supports("quantize", x, spec=SPEC)
    for a, b in zip(backend.quantize(x, spec=SPEC), ops.quantize(x, spec=SPEC), strict=True):
        assert torch.equal(a, b)


def test_leaves_what_needs_a_gradient():
    x = normal(1, 4, 32).requires_grad_()
    assert not backend.supports("quantize", x, spec=SPEC)
    with torch.no_grad():
        assert backend.supports("quantize", x, spec=SPEC)
        assert torch.equal(backend.quantize(x, spec=SPEC)[0], ops.quantize(x, spec=SPEC)[0])
    codes, minimum, maximum = ops.quantize(x.detach(), spec=SPEC)
    minimum.requires_grad_()
    assert not backend.supports("dequantize", codes, minimum, maximum, spec=SPEC, channels=32)


UNREADABLE = {
    "NumPy's": lambda: np.ones((1, 4, 32), "float32"),
    "float64": lambda: torch.ones(1, 4, 32, dtype=torch.float64),
    "sparse": lambda: torch.ones(1, 4, 32).to_sparse(),
    "on no device": lambda: torch.ones(1, 4, 32, device="meta"),
    "complex conjugate": lambda: torch.ones(1, 4, 32, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_leaves_what_it_cannot_read(kind):
    assert not backend.supports("quantize", UNREADABLE[kind](), spec=SPEC)


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(1, 4, 32)


@pytest.mark.parametrize("make", [fake, UNREADABLE["complex conjugate"]])
def test_no_view_of_what_dlpack_would_hand_out(make):
    """Memory that is none, or without the sign: NumPy refuses it, CuPy would not."""
    from kvcompress_torch import bridge

    with pytest.raises(TypeError, match="lazily"):
        bridge._view(make())


def test_vmap_runs_the_generic_operations():
    x = normal(3, 2, 8, 32)
    mapped = torch.vmap(lambda x: backend.supports("quantize", x, spec=SPEC) or x)(x)
    assert torch.equal(mapped, x)


@pytest.mark.parametrize("method", [GroupQuantization(4), RotatedQuantization(3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compressed_is_the_same(method, dtype):
    k, v = normal(2, 1, 2, 70, 64).to(dtype)
    a, b = (KVCacheCompressor(method, backend=name, sinks=2) for name in ("generic", "torch"))
    old, new = a.compress_kv(k, v), b.compress_kv(k, v)
    for part in ("keys", "values"):
        for name, x in getattr(old, part).payload.items():
            assert torch.equal(x, getattr(new, part).payload[name])
    for x, y in zip(a.decompress_kv(old), b.decompress_kv(new), strict=True):
        assert x.dtype == y.dtype == dtype
        assert torch.equal(x, y)


def test_the_kernels_are_used(monkeypatch):
    import kvcompress_numba

    called = []
    for op in ("within", "quantize", "dequantize"):
        kernel = getattr(kvcompress_numba.backend, op)

        @functools.wraps(kernel)  # which says what it takes, too
        def counted(_, *arrays, kernel=kernel, op=op, **static):
            called.append(op)
            return kernel(*arrays, **static)

        monkeypatch.setattr(type(kvcompress_numba.backend), op, counted)
    k = normal(1, 2, 70, 64)
    compressor = KVCacheCompressor(GroupQuantization(8))
    compressor.decompress_kv(compressor.compress_kv(k, k))
    assert called == ["within"] * 2 + ["quantize"] * 2 + ["dequantize"] * 2


@pytest.mark.parametrize("method", [GroupQuantization(4), RotatedQuantization(3)], ids=str)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_compiles(method):
    compressor = KVCacheCompressor(method)

    def there_and_back(k, v):
        return compressor.decompress_kv(compressor.compress_kv(k, v))

    k, v = normal(2, 1, 2, 70, 64)
    compiled = torch.compile(there_and_back, backend="aot_eager")
    for got, expected in zip(compiled(k, v), there_and_back(k, v), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_several_threads_at_once():
    x = normal(3, 999, 128)
    expected = ops.quantize(x, spec=SPEC)[0]
    with ThreadPoolExecutor(4) as pool:
        for codes, _, _ in pool.map(lambda _: backend.quantize(x, spec=SPEC), range(20)):
            assert torch.equal(codes, expected)


def test_without_kernels_the_generic_operations_run():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from kvcompress import KVCacheCompressor, GroupQuantization\n"
        "k = torch.ones(1, 1, 4, 8); c = KVCacheCompressor(GroupQuantization(4), backend='torch')\n"
        "print(torch.equal(c.decompress_kv(c.compress_kv(k, k))[0], k))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout == "True\n", done.stderr


def test_an_unknown_operation():
    with pytest.raises(AttributeError, match="has no operation 'sort'"):
        backend.sort(torch.ones(1))


def test_rotated_codes_too():
    x, spec = normal(2, 9, 64), RotatedSpec(4, 1)
    for a, b in zip(
        backend.quantize_rotated(x, spec=spec), ops.quantize_rotated(x, spec=spec), strict=True
    ):
        assert torch.equal(a, b)
