"""Files of every release are read for ever: codes and payloads must not change their meaning.

``pytest tests/test_golden.py --regenerate-golden`` writes them anew; codes come from the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest

from kvcompress import Hybrid, LowRank, Method, TensorSpec, VectorQuantization
from kvcompress.backend import Dispatcher
from kvcompress.ops import AffineSpec, cast, dequantize, pack, quantize, unpack
from kvcompress.ops.packing import code_dtype

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
SPECS = [
    ("float32", AffineSpec(2, 8, "channel")),
    ("float32", AffineSpec(3, 8, "token")),
    ("float32", AffineSpec(4, 64, "channel", "float32")),
    ("float32", AffineSpec(8, 5, "token")),
    ("float16", AffineSpec(4, 16, "channel")),
    ("bfloat16", AffineSpec(4, 16, "token")),
]
METHODS = [
    ("float32", LowRank(3)),
    ("float16", LowRank(2)),
    ("float32", Hybrid(4, 3, group_size=8, outliers=0.05)),
    ("bfloat16", Hybrid(5, 2, group_size=16)),
    ("float32", VectorQuantization(5, vector_dim=3, exact=0.1)),
    ("float16", VectorQuantization(16)),
]


def tensor(dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 19, 6)) + rng.standard_normal(6)
    x[:, ::4] = np.round(2 * x[:, ::4]) / 2
    x[0, :3, 0] = [0.0, -0.0, 2.0**-24]
    x[1, 0, :2] = [60000, -60000]
    return x.astype(DTYPES[dtype])


# What the files call settings and arrays that have been renamed since they were written.
RENAMED = {
    "ends_dtype": "range_dtype",
    "lower": "minimum",
    "upper": "maximum",
    "ends": "ranges",
    "ends_lower": "ranges_min",
    "ends_upper": "ranges_max",
}


def renamed(old):
    return {RENAMED.get(name, name): value for name, value in old.items()}


def save(name, meta, arrays):
    """bfloat16 travels as uint16: NumPy cannot name it in a file."""
    plain = {k: a.view("uint16") if a.dtype.name == "bfloat16" else a for k, a in arrays.items()}
    meta = {**meta, "dtypes": {k: a.dtype.name for k, a in arrays.items()}}
    np.savez_compressed(GOLDEN / f"{name}.npz", meta=np.array(json.dumps(meta)), **plain)


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: file[k] for k in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    kinds = meta.pop("dtypes")
    if "spec" in meta:
        meta["spec"] = renamed(meta["spec"])
    return meta, renamed(
        {k: a.view(DTYPES["bfloat16"]) if kinds[k] == "bfloat16" else a for k, a in arrays.items()}
    )


def write():
    GOLDEN.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for bits in range(1, 17):
        codes = rng.integers(0, 2**bits, (2, 21)).astype(code_dtype(bits))
        arrays |= {f"codes{bits}": codes, f"packed{bits}": oracle.pack_rows(codes, bits)}
    save("packing", {}, arrays)
    for i, (dtype, spec) in enumerate(SPECS):
        x = tensor(dtype, i)
        axis, ranges = spec.axis, np.dtype(DTYPES[spec.range_dtype or dtype])
        codes, minimum, maximum = oracle.quantize(x, spec.bits, spec.group_size, axis, ranges)
        arrays = {
            "x": x,
            "codes": oracle.pack_rows(codes, spec.bits),
            "minimum": minimum,
            "maximum": maximum,
        }
        save(f"affine{i}", {"spec": vars(spec)}, arrays)
    for i, (dtype, method) in enumerate(METHODS):
        x = tensor(dtype, i)
        payload = method.encode(x, "keys", Dispatcher())
        spec = TensorSpec(x.shape, dtype)
        arrays = {**payload, "decoded": decode(payload, method=method, spec=spec)}
        meta = {"method": method.to_dict(), "dtype": dtype, "shape": list(x.shape)}
        save(f"method{i}", meta, arrays)


@pytest.fixture(scope="module", autouse=True)
def regenerated(request):
    if request.config.getoption("--regenerate-golden"):
        write()


def names(prefix):
    found = sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.npz"))
    return found or [f"{prefix} files are missing"]


def test_packing(xp):
    _, arrays = load("packing")
    for bits in range(1, 17):
        codes, packed = arrays[f"codes{bits}"], arrays[f"packed{bits}"]
        found = xp.run(pack, xp.asarray(codes), bits=bits)
        np.testing.assert_array_equal(xp.numpy(found), packed, strict=True)
        found = xp.run(unpack, xp.asarray(packed), bits=bits, n=21)
        np.testing.assert_array_equal(xp.numpy(found), codes, strict=True)


@pytest.mark.parametrize("name", names("affine"))
def test_quantize(xp, name):
    meta, arrays = load(name)
    spec, x = AffineSpec(**meta["spec"]), arrays["x"]
    if x.dtype.name not in xp.dtypes:
        pytest.skip(f"{xp} has no {x.dtype.name}")
    encoded = xp.run(quantize, xp.asarray(x), spec=spec)
    for key, a in zip(("codes", "minimum", "maximum"), encoded, strict=True):
        a = xp.numpy(a)
        assert (a.dtype, a.shape) == (arrays[key].dtype, arrays[key].shape)
        assert a.tobytes() == arrays[key].tobytes(), key
    stored = [xp.asarray(arrays[key]) for key in ("codes", "minimum", "maximum")]
    back = xp.numpy(xp.run(dequantize, *stored, spec=spec, channels=x.shape[-1]))
    for head in range(len(x)):
        ranges = arrays["minimum"][head], arrays["maximum"][head]
        bound = oracle.quantizer_bound(x[head], *ranges, spec.bits, spec.group_size, spec.axis)
        assert (abs(back[head].astype("float64") - x[head].astype("float64")) <= bound).all()


def decode(payload, *, method, spec):
    """As the compressor does: `cast` narrows what the method restores."""
    return cast(method.decode(payload, spec, "keys", Dispatcher()), dtype=spec.dtype)


@pytest.mark.parametrize("name", names("method"))
def test_old_payloads_are_read(xp, name):
    meta, arrays = load(name)
    if meta["dtype"] not in xp.dtypes:
        pytest.skip(f"{xp} has no {meta['dtype']}")
    decoded = arrays.pop("decoded").astype("float64")
    spec = TensorSpec(tuple(meta["shape"]), meta["dtype"])
    payload = {key: xp.asarray(a) for key, a in arrays.items()}
    out = xp.run(decode, payload, method=Method.from_dict(meta["method"]), spec=spec)
    # Two float32 sums of up to 6 products and a mean, twice 16 roundings, then the dtype.
    size = 2 * oracle.gamma(16) * 17 * arrays["scale"] + oracle.SMALLEST[meta["dtype"]]
    bound = size + 2 * oracle.UNIT[meta["dtype"]] * abs(decoded)
    assert (abs(xp.numpy(out).astype("float64") - decoded) <= bound).all()
