from __future__ import annotations

import sys
import textwrap
from collections import Counter

import numpy as np
import pytest

from kvcompress import Hybrid, KVCacheCompressor, VectorQuantization, backend, ops
from kvcompress.backend import Backend, Dispatcher, names, select
from kvcompress.errors import BackendError, BackendWarning
from kvcompress.testing import conformance

COMPRESSORS = {"quantize": Hybrid(4, 3), "nearest": VectorQuantization(4, exact=0.0)}

LOOPBACK = """
    from kvcompress import ops

    class Loopback:
        name = "loopback"
        calls = []

        def available(self):
            return True

        def supports(self, op, *arrays, **static):
            return all(type(a).__module__ == "numpy" for a in arrays)

        def _run(self, op, arrays, static):
            self.calls.append(op)
            return getattr(ops, op)(*arrays, **static)

        def quantize(self, x, **static):
            return self._run("quantize", (x,), static)

        def dequantize(self, *arrays, **static):
            return self._run("dequantize", arrays, static)

        def nearest(self, *arrays):
            return self._run("nearest", arrays, {})

    backend = Loopback()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install distributions with entry points, the way pip would; nothing else is there."""
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backend, "BUILTIN", {})

    def install(name, source):
        (tmp_path / f"{name}_backend.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{name}_backend-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}-backend\nVersion: 1.0\n"
        )
        entry = f"[kvcompress.backends]\n{name} = {name}_backend:backend\n"
        (info / "entry_points.txt").write_text(entry)
        monkeypatch.syspath_prepend(tmp_path)
        backend._automatic.cache_clear()

    before = set(sys.modules)
    yield install
    backend._automatic.cache_clear()
    for name in set(sys.modules) - before:
        if name.endswith("_backend"):
            del sys.modules[name]


@pytest.fixture
def loopback(install):
    install("loopback", LOOPBACK)
    return backend.load("loopback")


def run(compressor, xp=np.asarray):
    x = xp(np.random.default_rng(0).standard_normal((1, 2, 9, 4)).astype("float32"))
    return compressor.decompress_kv(compressor.compress_kv(x, x))


@pytest.mark.parametrize("choice", [None, "auto", "loopback"])
def test_a_backend_runs_what_it_supports(loopback, choice):
    expected = run(KVCacheCompressor(COMPRESSORS["quantize"], backend="generic"))
    assert loopback.calls == []
    out = run(KVCacheCompressor(COMPRESSORS["quantize"], backend=choice))
    # Codes and their ranges, of keys and of values.
    assert loopback.calls == 4 * ["quantize"] + 4 * ["dequantize"]
    np.testing.assert_array_equal(out, expected)
    # `lookup` is no method of it: the generic form runs.
    run(KVCacheCompressor(COMPRESSORS["nearest"], backend=choice))
    assert loopback.calls[8:] == ["nearest", "nearest"]


def test_its_results_are_used(loopback, monkeypatch):
    plain = run(KVCacheCompressor(Hybrid(4, 3)))
    zeros = staticmethod(lambda *a, **s: 0 * ops.dequantize(*a, **s))
    monkeypatch.setattr(type(loopback), "dequantize", zeros)
    assert not np.array_equal(run(KVCacheCompressor(Hybrid(4, 3)))[0], plain[0])


def test_what_it_does_not_support_runs_generic(xp, loopback):
    run(KVCacheCompressor(Hybrid(4, 3)), xp.asarray)
    assert bool(loopback.calls) == xp.name.startswith("numpy")


@pytest.mark.parametrize("value", ["generic", "loopback"])
def test_the_environment_chooses_where_no_argument_does(loopback, monkeypatch, value):
    monkeypatch.setenv("KVCOMPRESS_BACKEND", value)
    run(KVCacheCompressor(Hybrid(4, 3)))
    assert bool(loopback.calls) == (value == "loopback")
    run(KVCacheCompressor(Hybrid(4, 3), backend="generic"))
    assert len(loopback.calls) in (0, 8)
    run(KVCacheCompressor(Hybrid(4, 3), backend="loopback"))
    assert loopback.calls


def test_the_choice_is_no_part_of_the_result(loopback):
    x = np.ones((1, 1, 5, 4), "float32")
    z = KVCacheCompressor(Hybrid(4, 3), backend="loopback").compress_kv(x, x)
    loopback.calls.clear()
    KVCacheCompressor(Hybrid(4, 3), backend="generic").decompress_kv(z)
    assert loopback.calls == []


@pytest.mark.usefixtures("loopback")
def test_names():
    assert "loopback" in names()
    assert len(set(names())) == len(names())


def test_an_unknown_backend(monkeypatch):
    with pytest.raises(BackendError, match="unknown backend 'warp'; known here: auto, generic"):
        run(KVCacheCompressor(Hybrid(4), backend="warp"))
    monkeypatch.setenv("KVCOMPRESS_BACKEND", "warp")
    with pytest.raises(BackendError, match="'warp'"):
        run(KVCacheCompressor(Hybrid(4)))


@pytest.mark.parametrize(
    "source",
    ["raise RuntimeError('no driver')", "import no_such_module", "backend = 3", "pass"],
)
def test_a_failing_backend_warns_once_and_raises_by_name(install, source):
    install("broken", source)
    with pytest.warns(BackendWarning, match="'broken' failed to load and is left out") as caught:
        first, _ = (run(KVCacheCompressor(Hybrid(4, 3))) for _ in range(2))
    assert len(caught) == 1
    np.testing.assert_array_equal(first, run(KVCacheCompressor(Hybrid(4, 3), backend="generic")))
    with pytest.raises(BackendError, match="'broken' failed to load"):
        run(KVCacheCompressor(Hybrid(4, 3), backend="broken"))


def test_one_failing_backend_does_not_stop_the_others(install):
    install("broken", "raise ImportError('nothing here')")
    install("loopback", LOOPBACK)
    with pytest.warns(BackendWarning):
        run(KVCacheCompressor(Hybrid(4, 3)))
    assert backend.load("loopback").calls


def test_an_unavailable_backend(install):
    install("loopback", LOOPBACK.replace("return True", "return False"))
    run(KVCacheCompressor(Hybrid(4, 3)))
    assert backend.load("loopback").calls == []
    with pytest.raises(BackendError, match="not available on this machine"):
        select("loopback")


def test_the_first_that_supports_a_call_takes_it():
    class Named:
        def __init__(self, name, op):
            self.name, self.op = name, op

        def available(self):
            return True

        def supports(self, op, *arrays, **static):
            return op == self.op and static == {"n": 3}

        def pack(self, x, **static):
            return self.name

        unpack = pack

    def pack(*_, **__):
        return "generic"

    def unpack(*_, **__):
        return "generic"

    chosen = Dispatcher((Named("a", "unpack"), Named("b", "pack"), Named("c", "pack")))
    assert all(isinstance(b, Backend) for b in chosen.backends)
    assert chosen(pack, 0, n=3) == "b"
    assert chosen(unpack, 0, n=3) == "a"
    assert chosen(pack, 0, n=4) == "generic"
    assert Dispatcher()(pack, 0, n=3) == "generic"


def test_the_loopback_backend_conforms(loopback):
    taken = conformance.check_backend(loopback)
    assert set(taken) == {"quantize", "dequantize", "nearest"}
    assert sum(taken.values()) == len(loopback.calls) > 100


def test_conformance_on_every_library(xp, loopback, monkeypatch):
    monkeypatch.setattr(type(loopback), "supports", lambda *_, **__: True)
    for op in {case.op for case in conformance.cases()}:
        monkeypatch.setattr(
            type(loopback), op, staticmethod(conformance.generic(op)), raising=False
        )
    seen, turn = set(), Counter()
    for case in conformance.cases():
        turn[case.op] += 1
        if turn[case.op] % (23 if xp.is_jax else 5) != 1:  # all shapes and dtypes in turn
            continue
        # array-api-strict has neither float16 nor bfloat16.
        dtypes = {case.static.get("dtype"), *(a.dtype.name for a in case.arrays)}
        dtypes.add(getattr(case.static.get("spec"), "range_dtype", None))
        if dtypes & {"float16", "bfloat16"} - {*xp.dtypes}:
            continue
        writable = case.overwrites and xp.name == "numpy-readonly"
        asarray = np.array if writable else xp.asarray
        assert conformance.check(loopback, case, asarray=asarray)
        seen.add(case.op)
    assert seen == {case.op for case in conformance.cases()}


def broken(op, change):
    def kernel(_, *arrays, **static):
        return change(getattr(ops, op)(*arrays, **static), arrays)

    return kernel


def scribble(result, arrays):
    arrays[0][...] = 0
    return result


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("quantize", lambda r, _: (r[0], r[2], r[1])),
        ("quantize", lambda r, _: (r[0] ^ 1, *r[1:])),
        ("quantize", lambda r, _: (r[0].astype("int32"), *r[1:])),
        ("quantize", lambda r, _: (r[0], r[1] * np.float32(1 + 2**-23), r[2])),
        ("quantize", lambda r, _: (r[0], np.where(r[1] == 0, -r[1], r[1]), r[2])),
        ("quantize", scribble),
        ("dequantize", lambda r, _: r * np.float32(1.00001)),
        ("dequantize", lambda r, _: r.astype("float64")),
        ("dequantize", lambda r, _: r[..., :-1]),
        ("nearest", lambda r, _: r * 0 + 2 if r.size and r.max() > 1 else r),
        ("nearest", lambda r, _: np.where(r == 0, 1, r).astype("int32")),
        ("nearest", scribble),
        ("within", lambda r, _: ~r),
        ("clip_groups", lambda r, _: r + np.float32(2.0**-140)),
        ("clip_groups", lambda _, a: a[0].astype("float32")),
        ("quantize_rotated", lambda r, _: (r[0] ^ 1, r[1])),
        ("quantize_rotated", lambda r, _: (r[0], r[1] * np.float32(1 + 2**-23))),
        ("quantize_rotated", lambda r, _: (r[0], -r[1])),
        ("dequantize_rotated", lambda r, _: -r),
        ("dequantize_rotated", lambda r, _: r * 1.0001),
        ("dequantize_rotated", lambda r, _: r[..., ::-1]),
        ("encode_product", lambda r, _: r ^ 1),
        ("encode_product", lambda r, _: r.astype("int32")),
        ("decode_product", lambda r, _: r * np.float32(1 + 2**-23)),
        ("decode_product", scribble),
    ],
)
def test_conformance_finds_what_is_wrong(loopback, monkeypatch, op, change):
    monkeypatch.setattr(type(loopback), op, broken(op, change), raising=False)
    with pytest.raises(AssertionError):
        conformance.check_backend(loopback)


def test_a_backend_that_takes_nothing_does_not_conform(loopback, monkeypatch):
    monkeypatch.setattr(type(loopback), "supports", lambda *_, **__: False)
    with pytest.raises(AssertionError, match="took none"):
        conformance.check_backend(loopback)
