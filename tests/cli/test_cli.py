from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from inspect import signature
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import kvcompress
from kvcompress import CompressedKV, Hybrid, KVCacheCompressor, Method, VectorQuantization
from kvcompress.cli.app import app
from kvcompress.cli.libraries import Library, median_time
from kvcompress.cli.presets import presets, settings
from kvcompress.ops import OPERATIONS

LIBRARIES = [
    pytest.param(name, marks=pytest.mark.library(name)) for name in ("numpy", "jax", "torch")
]

# Before click 8.2, a runner mixes stderr into stdout unless told not to.
APART = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}


def run(*args: str | Path, env: dict[str, str] | None = None) -> Result:
    runner = CliRunner(env={"KVCOMPRESS_BACKEND": None, **(env or {})}, **APART)
    return runner.invoke(app, [str(arg) for arg in args])


def report(*args: str | Path) -> dict:
    result = run("compare", *args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def error(*args: str | Path, env: dict[str, str] | None = None) -> str:
    """Of a command that must fail with one line on stderr and exit code 2."""
    result = run(*args, env=env)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def arrays(heads=2, tokens=40, dim=8, dtype="float16", queries=5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"k": (heads, tokens, dim), "v": (heads, tokens, dim), "q": (2 * heads, queries, dim)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def npz(tmp_path: Path):
    def save(**contents: np.ndarray) -> Path:
        np.savez(tmp_path / "cache.npz", **contents)
        return tmp_path / "cache.npz"

    return save


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert kvcompress.__version__ in result.stdout


@pytest.mark.parametrize("command", [[], ["compare"], ["bench"], ["doctor"]])
def test_help_has_examples(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert re.search(r"Examples?:\n +(KVCOMPRESS_BACKEND=\w+ )?kvcompress", result.stdout)


def test_python_m_and_bad_usage():
    done = subprocess.run(
        [sys.executable, "-m", "kvcompress", "compare", "nowhere.npz"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "Error: nowhere.npz: No such file or directory\n"


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra_it_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; from kvcompress.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert package in line
    assert "pip install 'kvcompress[cli]'" in line


def test_compare_sample():
    """The main job, on the smallest set of methods; its numbers are those of the library."""
    facts = report("--methods", "Hybrid")
    assert facts["layers"] == 3
    assert facts["key_shape"] == [3, 768, 64]
    assert [Method.from_dict(r["method"]) for r in facts["results"]] == list(
        presets([64])["Hybrid"]
    )
    finest = facts["results"][-1]
    assert finest["method"]["quant_bits"] == 8
    assert finest["key_relative_mse"] < 1e-4
    assert finest["attention_relative_error"] < 0.02


@pytest.mark.parametrize("library", LIBRARIES)
def test_compare_measures_what_the_library_does(library, npz):
    data = arrays()
    names = list(presets([16])) if library != "jax" else ("LowRank",)  # compiling takes a while
    options = ("--methods", ",".join(names), "--sinks", "2", "--window", "3")
    facts = report(npz(**data), "--library", library, *options)
    assert facts["library"] == library
    assert {r["method"]["method"] for r in facts["results"]} == set(names)
    for row in facts["results"]:
        compressor = KVCacheCompressor(Method.from_dict(row["method"]), sinks=2, window=3)
        compressed = compressor.compress_kv_3d(data["k"], data["v"])
        assert isinstance(compressed, CompressedKV)
        assert row["bits_per_value"] == pytest.approx(compressed.bits_per_value)
        assert row["ratio"] == pytest.approx(compressed.ratio)
        k, v = (x.astype("float64") for x in compressor.decompress_kv_3d(compressed))
        for role, x, y in (("key", data["k"], k), ("value", data["v"], v)):
            mse = np.sum((x - y) ** 2) / np.sum(x.astype("float64") ** 2)
            # Libraries may disagree on vectors as near to one code as to another.
            slack = 0.2 if row["method"]["method"] == "VectorQuantization" else 1e-2
            assert row[f"{role}_relative_mse"] == pytest.approx(mse, rel=slack)
        assert row["attention_relative_error"] > 0
        assert row["compress_mb_per_s"] > 0
        assert row["decompress_mb_per_s"] > 0


def test_compare_without_queries(npz):
    data = arrays()
    del data["q"]
    path = npz(**data)
    assert {r["attention_relative_error"] for r in report(path)["results"]} == {None}
    table = run("compare", path, "--methods", "LowRank").stdout
    assert re.search(r"rank=2 .* - ", table)


def test_compare_table(npz):
    result = run("compare", npz(**arrays()))
    assert result.exit_code == 0
    assert result.stderr == ""  # no progress bar where there is no terminal
    for name in presets([64]):
        assert name in result.stdout
    assert "quant_bits=8" in result.stdout
    assert "|x - x'|^2 / |x|^2" in result.stdout


def test_compare_methods(npz):
    rows = report(npz(**arrays()), "--methods", "lowrank, HYBRID")["results"]
    assert {r["method"]["method"] for r in rows} == {"LowRank", "Hybrid"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_compare_safetensors(dtype, tmp_path):
    path = tmp_path / "cache.safetensors"
    names = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}
    data = {
        name: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for name, x in arrays().items()
    }
    write_safetensors(path, {name: (names[dtype], x) for name, x in data.items()})
    facts = report(path, "--methods", "Hybrid")
    assert facts["dtype"] == dtype
    assert facts["results"][-1]["key_relative_mse"] < 1e-3


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, body = {}, b""
    for name, (dtype, x) in tensors.items():
        span = [len(body), len(body) + x.nbytes]
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": span}
        body += x.tobytes()
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


@pytest.mark.parametrize("name", ["layers.{}.{}", "{1}.{0}"])
def test_compare_layers(name, npz):
    data = arrays()
    other = {role: 3 * x[:, ::-1] for role, x in data.items()}
    both = {name.format(i, r): x for i, d in ((11, data), (2, other)) for r, x in d.items()}
    together = report(npz(**both, ignored=np.array(1)), "--methods", "Hybrid")
    assert together["layers"] == 2
    alone = [report(npz(**d), "--methods", "Hybrid") for d in (data, other)]
    for row, *single in zip(together["results"], *(a["results"] for a in alone), strict=True):
        for key in ("key_relative_mse", "value_relative_mse", "attention_relative_error"):
            assert row[key] == pytest.approx(np.mean([s[key] for s in single]))
        assert row["bits_per_value"] == pytest.approx(single[0]["bits_per_value"])


def test_compare_batch_is_folded_into_heads(npz):
    data = arrays(heads=4)
    batched = {name: x.reshape(2, -1, *x.shape[1:]) for name, x in data.items()}
    flat = report(npz(**data), "--methods", "Hybrid,LowRank")["results"]
    rows = report(npz(**batched), "--methods", "Hybrid,LowRank")["results"]
    for a, b in zip(rows, flat, strict=True):
        for key in ("bits_per_value", "key_relative_mse", "attention_relative_error"):
            assert a[key] == pytest.approx(b[key])


def test_compare_keys_and_values_of_other_widths(npz):
    data = arrays(dim=12)
    data["v"] = data["v"][..., :9]
    facts = report(npz(**data))
    assert facts["value_shape"] == [2, 40, 9]
    assert max(r["method"].get("rank", 0) for r in facts["results"]) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, "layer 0 has no array v"),
        ({"k": None, "v": None, "q": None}, "holds no arrays k and v"),
        ({"k": np.ones((2, 40, 8))}, "k must be float16, bfloat16 or float32, got float64"),
        ({"k": np.ones((40, 8), "float16")}, "k must be [heads, seq, dim]"),
        ({"k": np.ones((2, 0, 8), "float16")}, "k is empty"),
        ({"k": np.ones((2, 41, 8), "float16")}, "k and v must agree in all sizes but the last"),
        ({"k": np.ones((2, 40, 8), "float32")}, "k and v must have one dtype"),
        ({"k": np.full((2, 40, 8), np.nan, "float16")}, "k holds NaN or infinities"),
        ({"q": np.ones((3, 5, 8), "float16")}, "multiple"),
        ({"q": np.ones((4, 41, 8), "float16")}, "last tokens"),
        ({"k": np.full((2, 40, 8), None)}, "Object arrays cannot be loaded"),
        ({"layers.0.k": np.ones((2, 40, 8), "float16")}, "ambiguous"),
        ({"layers.3.k": np.ones((2, 40, 8), "float16")}, "layer 3 has no array v"),
    ],
)
def test_compare_rejects_arrays(change, message, npz):
    contents = {name: x for name, x in {**arrays(), **change}.items() if x is not None}
    line = error("compare", npz(**contents))
    assert message in line
    assert line.startswith("Error: ")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_compare_rejects_corrupt_files(suffix, tmp_path):
    path = tmp_path / f"cache{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays())
    else:
        save_file(arrays(), path)
    whole = path.read_bytes()
    for part in (b"", b"PK\x03\x04nonsense", whole[: len(whole) // 2]):
        path.write_bytes(part)
        assert f"not a readable {suffix} file" in error("compare", path)


def test_compare_rejects_other_files(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(3))
    assert "expected a file .npz or .safetensors" in error("compare", tmp_path / "one.npy")
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    assert "numpy.savez" in error("compare", tmp_path / "one.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "directory" in error("compare", tmp_path / "folder.npz")
    write_safetensors(tmp_path / "d.safetensors", {"k": ("F64", np.ones((2, 4, 4)))})
    assert "k must be float16" in error("compare", tmp_path / "d.safetensors")


def test_compare_rejects_options():
    assert "unknown method 'Zip'; known: GroupQuantization" in error(
        "compare", "--methods", "LowRank,Zip"
    )
    assert "no such directory" in error("compare", "--plot", "no/where.png")
    assert "suffix must be one of" in error("compare", "--plot", "picture.doc")
    assert "unknown backend 'warp'" in error("compare", env={"KVCOMPRESS_BACKEND": "warp"})


def test_compare_plot(npz, tmp_path):
    path = tmp_path / "picture.svg"
    result = run("compare", npz(**arrays()), "--plot", path)
    assert result.exit_code == 0, result.stderr
    assert path.read_text().startswith("<?xml")


def test_presets_fit_every_width():
    for dim in (1, 2, 3, 5, 16, 64, 80, 96, 128, 192, 256, 576):
        found = presets([dim])
        assert set(found) >= {"LowRank", "VectorQuantization", "Hybrid", "GroupQuantization"}
        for methods in found.values():
            assert len(methods) == len(set(methods)) >= 1
            for method in methods:
                KVCacheCompressor(method).estimate_size((2, 100, dim))


def test_settings_are_those_that_are_not_defaults():
    assert settings(VectorQuantization(16, 4, seed=7)) == "codebook_size=16, vector_dim=4, seed=7"
    assert settings(Hybrid(8)) == "rank=8"


@pytest.mark.parametrize("library", LIBRARIES)
def test_bench(library, monkeypatch):
    names = list(presets([16])) if library != "jax" else ("LowRank",)  # compiling takes a while
    few = {name: known for name, known in presets([16]).items() if name in names}
    monkeypatch.setattr("kvcompress.cli.bench.presets", lambda _: few)
    result = run("bench", "--library", library, "--shape", "1,2,64,16", "--repeat", "1")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    measured = Counter(row[0] for row in rows if "generic" in row[:3])
    assert measured.pop("compress") == measured.pop("decompress") == len(names)
    # Once each, but for what there are groups along either axis of.
    assert measured == Counter([*OPERATIONS, "quantize", "dequantize", "clip_groups"])


def test_bench_of_all_libraries_and_dtypes(monkeypatch):
    monkeypatch.setattr("kvcompress.cli.bench.presets", lambda _: {})
    monkeypatch.setattr("kvcompress.cli.bench.installed", lambda: ["numpy"])
    dtypes = ("--dtype", "float16", "--dtype", "bfloat16")
    result = run("bench", "--shape", "1,2,64,16", "--repeat", "1", *dtypes)
    assert result.exit_code == 0, result.stderr
    rows = [line.split()[:4] for line in result.stdout.splitlines()]
    for op in ("within", "quantize"):
        for dtype in ("float16", "bfloat16"):
            assert [op, "numpy", "generic", dtype] in rows


def test_bench_measures_every_backend_that_takes_a_call(monkeypatch):
    class Loopback:
        name = "loopback"

        def available(self):
            return True

        def supports(self, op, *arrays, **static):
            return True

        def quantize(self, x, *, spec):
            time.sleep(0.005)
            return kvcompress.ops.quantize(x, spec=spec)

    few = {"GroupQuantization": (kvcompress.GroupQuantization(8),)}
    monkeypatch.setattr("kvcompress.cli.bench.presets", lambda _: few)
    monkeypatch.setattr("kvcompress.backend.names", lambda: ("loopback",))
    monkeypatch.setattr("kvcompress.backend.load", {"loopback": Loopback()}.get)
    kvcompress.backend._automatic.cache_clear()
    try:
        result = run("bench", "--library", "numpy", "--shape", "1,1,16,8", "--repeat", "1")
    finally:
        kvcompress.backend._automatic.cache_clear()
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    rows = {tuple(row[:3]): row for row in rows if len(row) > 3}
    fast = rows["quantize", "numpy", "loopback"]
    assert float(fast[4]) >= 5
    assert float(fast[7]) > 1
    assert float(rows["quantize", "numpy", "generic"][7]) == 1
    assert ("dequantize", "numpy", "loopback") not in rows
    # All but a little of the time of compressing is spent in the two calls of the kernel.
    assert int(rows["compress", "numpy", "loopback"][8].rstrip("%")) < 50


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,x", "1,0,3,4", ""])
def test_bench_rejects_shapes(shape):
    assert "four positive integers" in error("bench", "--shape", shape)


def test_peak_leaves_out_input_and_output():
    x = np.ones(2**20, dtype="uint8")
    extra = Library().peak(lambda x: (x + 1) + 1, x)
    assert extra == pytest.approx(x.nbytes, rel=0.05)
    assert Library().peak(lambda x: x + 1, x) < x.nbytes / 20


def test_median_time_counts_calls():
    calls = []
    seconds, result = median_time(lambda: calls.append(1) or len(calls), repeat=3)
    assert (len(calls), result) == (4, 4)  # one to warm up
    assert seconds >= 0
    median_time(lambda: calls.append(1), repeat=3, budget=0)
    assert len(calls) == 6


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0
    assert f"kvcompress {kvcompress.__version__}" in result.stdout
    assert re.search(rf"NumPy +{re.escape(np.__version__)} +yes", result.stdout)
    assert "KVCOMPRESS_BACKEND: not set" in result.stdout


def test_doctor_warms(monkeypatch):
    few = {"GroupQuantization": (kvcompress.GroupQuantization(8),)}
    monkeypatch.setattr("kvcompress.cli.doctor.presets", lambda _: few)
    result = run("doctor", "--warm")
    assert result.exit_code == 0, result.stderr
    for dtype in ("float16", "bfloat16", "float32"):
        assert re.search(rf"GroupQuantization.* {dtype} +\d+\.\d\d s +\d\.\d{{4}} s", result.stdout)


def test_doctor_shows_backends(monkeypatch):
    class Away:
        name = "away"

        def available(self):
            return False

        def supports(self, op, *arrays, **static):
            return False

    def load(name):
        if name == "broken":
            raise OSError("no driver")
        return Away()

    monkeypatch.setattr("kvcompress.backend.names", lambda: ("away", "broken"))
    monkeypatch.setattr("kvcompress.backend.load", load)
    result = run("doctor", env={"KVCOMPRESS_BACKEND": "away"})
    assert result.exit_code == 0
    assert re.search("away +not available here", result.stdout)
    assert re.search("broken +failed to load: no driver", result.stdout)
    assert "KVCOMPRESS_BACKEND: away" in result.stdout
    assert "in use: none: backend 'away' is installed but not available" in result.stdout


def test_doctor_imports_no_array_library():
    code = (
        "import sys\nfrom kvcompress.cli.app import app\n"
        "app(['doctor'], standalone_mode=False)\n"
        "assert not {'jax', 'torch', 'cupy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
