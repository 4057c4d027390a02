"""One file and one line: what is registered is listed, compared, plotted, checked and restored."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
from click.testing import CliRunner

from kvcompress import KVCacheCompressor, Method, TensorSpec
from kvcompress.cli.app import app
from kvcompress.cli.presets import presets
from kvcompress.errors import MethodWarning, SettingError
from kvcompress.methods import known_cache_methods, known_methods, registry
from kvcompress.ops import AffineSpec, cast, dequantize, quantize
from kvcompress.testing import check_method

SOURCE = '''
from dataclasses import dataclass
from kvcompress import Method, TensorSpec
from kvcompress.ops import cast

@dataclass(frozen=True)
class Halved(Method):
    """Keep half floats."""

    identifier = "example.halved"
    size: int = 2

    @classmethod
    def presets(cls, head_dims):
        return (cls(),)

    def encoded_spec(self, spec, role):
        return {"halves": TensorSpec(spec.shape, "float16")}

    def encode(self, x, role, dispatch):
        return {"halves": dispatch(cast, x, dtype="float16")}

    def decode(self, payload, spec, role, dispatch):
        return dispatch(cast, payload["halves"], dtype="float32")
'''


@pytest.fixture
def fresh(monkeypatch):
    """What is registered in a test is forgotten after it."""
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    registry._load_entry_points.cache_clear()
    yield
    registry._load_entry_points.cache_clear()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """What installing a distribution leaves behind that brings a method."""
    info = tmp_path / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: example\nVersion: 1.0\n")
    points = "[kvcompress.methods]\nhalved = example_halved:Halved\n"
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "example_halved.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("example_halved", None)


def test_a_new_method_is_one_file(fresh, plugin):
    """An installed method is compared and plotted, restored from JSON, and conforms."""
    assert "example.halved" in known_methods()
    picture = plugin / "compare.svg"
    k, v = np.random.default_rng(0).standard_normal((2, 2, 20, 8), dtype=np.float32)
    np.savez(plugin / "kv.npz", k=k, v=v)
    command = ["compare", str(plugin / "kv.npz"), "--json", "--plot", str(picture)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    (row,) = [row for row in rows if row["method"]["method"] == "example.halved"]
    assert row["bits_per_value"] == 16
    assert {row["method"]["method"] for row in rows} == set(presets([8]))
    assert "example.halved" in picture.read_text()
    assert CliRunner().invoke(app, ["doctor", "--warm"]).stdout.count("example.halved") == 3
    method = Method.from_dict({"method": "example.halved", "size": 3})
    assert method == known_methods()["example.halved"](3)


def test_an_entry_point_that_fails_is_left_out(fresh, plugin):
    (plugin / "example_halved.py").write_text("raise RuntimeError('no such luck')")
    with pytest.warns(MethodWarning, match="no such luck"):
        assert "example.halved" not in known_methods()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(known_methods()) >= {"LowRank", "Hybrid"}


@pytest.mark.parametrize("name", list(presets([8])))
def test_every_registered_method_conforms(xp, name):
    if xp.is_jax:
        pytest.skip("compiling takes minutes; tests/methods/test_methods.py runs JAX")
    methods = presets([8])[name]

    def asarray(x):
        if x.dtype.name not in xp.dtypes:
            raise TypeError(x.dtype)
        return xp.asarray(x)

    for method in (methods[0], methods[-1]):
        assert check_method(method, head_dim=8, asarray=asarray) > 0


@dataclass(frozen=True)
class _Rounded(Method):
    """Not registered: it has no identifier."""

    bits: int = 4

    def encoded_spec(self, spec, role):
        affine = AffineSpec(self.bits, 8, "token")
        ends = TensorSpec((spec.shape[0], *affine.range_shape(*spec.shape[1:])), spec.dtype)
        codes = TensorSpec((spec.shape[0], *affine.codes_shape(*spec.shape[1:])), "uint8")
        return {"codes": codes, "min": ends, "max": ends}

    def encode(self, x, role, dispatch):
        affine = AffineSpec(self.bits, 8, "token")
        return dict(zip(("codes", "min", "max"), dispatch(quantize, x, spec=affine), strict=True))

    def decode(self, payload, spec, role, dispatch):
        static = {"spec": AffineSpec(self.bits, 8, "token"), "channels": spec.shape[-1]}
        return dispatch(dequantize, *(payload[n] for n in ("codes", "min", "max")), **static)

    def to_dict(self):
        return {"method": "Rounded", "bits": self.bits}


def test_unregistered_methods_work_but_are_not_listed():
    assert "_Rounded" not in {cls.__name__ for cls in known_methods().values()}
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 8), dtype=np.float32)
    compressor = KVCacheCompressor(_Rounded())
    k, _ = compressor.decompress_kv(compressor.compress_kv(x, x))
    assert np.max(np.abs(k - x)) < 0.3
    with pytest.raises(SettingError, match="unknown method 'Rounded'"):
        Method.from_dict(_Rounded().to_dict())


@dataclass(frozen=True)
class _Faulty(Method):
    """Does what its fault says; registered by the test alone."""

    fault: str

    def encoded_spec(self, spec, role):
        return {"x": TensorSpec(spec.shape, "float32" if self.fault == "size" else "float16")}

    def encode(self, x, role, dispatch):
        if self.fault == "arguments" and x.size:
            x[...] += 1
        if self.fault == "again" and x.size:
            x = x + np.random.default_rng().standard_normal(x.shape).astype(x.dtype)
        return {"y" if self.fault == "payload" else "x": cast(x, dtype="float16")}

    def decode(self, payload, spec, role, dispatch):
        x = cast(payload["y" if self.fault == "payload" else "x"], dtype="float32")
        if self.fault == "finite":
            x = x * np.float32("nan")
        return x[..., :1] if self.fault == "shape" else x


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("payload", "the payload"),
        ("size", "the payload"),
        ("shape", "dimension"),
        ("finite", "finite"),
        ("again", "again"),
        ("arguments", "argument"),
    ],
)
def test_faults_of_a_method_are_found(fresh, monkeypatch, fault, found):
    monkeypatch.setattr(_Faulty, "identifier", "faulty", raising=False)
    registry.register(_Faulty)
    with pytest.raises((AssertionError, ValueError), match=found):
        check_method(_Faulty(fault), head_dim=8)
    assert check_method(_Faulty("none"), head_dim=8) > 0


def test_identifiers_are_unique_and_stable(fresh):
    for name, cls in (known_methods() | known_cache_methods()).items():
        assert cls.identifier == name
    halves = replace(next(iter(presets([8])["LowRank"])))
    assert halves.to_dict()["method"] == "LowRank"
    with pytest.raises(SettingError, match="identifier"):

        class Other(Method):
            identifier = "LowRank"
