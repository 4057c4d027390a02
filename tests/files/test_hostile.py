"""Files whose checksum is right and whose contents are not: each is refused, and says why."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fuzz.container import File
from fuzz.formats import formats

from kvcompress.errors import CalibrationError

FORMATS = formats()


def drop(name):
    return lambda file: file.arrays.pop(name)


def put(name, change):
    return lambda file: file.put(name, np.asarray(change(file.array(name))))


def fill(name, value):
    return put(name, lambda x: np.full_like(x, value))


def set_first(name, value):
    def change(x):
        x.reshape(-1)[0] = value
        return x

    return put(name, change)


def text(value):
    return lambda file: setattr(file, "text", value)


def fact(*path, to):
    def change(file):
        facts = holder = file.facts
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = to
        file.text = json.dumps(facts)

    return change


def dtype(name, other):
    def change(file):
        _, shape, data = file.arrays[name]
        file.arrays[name] = [other, shape, data[: int(np.prod(shape)) * 2]]

    return change


DEEP = text("[" * 100_000)
SHAPE = ("groups", 0, "group", "shapes", 0)

CASES = [
    ("Calibration", drop("0.tokens"), "array 0.tokens is missing"),
    ("Calibration", put("0.tokens", lambda x: x.reshape(1)), r"tokens must have shape \[\]"),
    ("Calibration", fill("0.tokens", 299.5), "tokens must be whole"),
    ("Calibration", fill("0.tokens", 0), "must have 0 rows"),
    ("Calibration", fill("0.nonzero", 1e9), "nonzero exceeds"),
    ("Calibration", fill("0.key_moment", np.nan), "key_moment must be finite, got nan at index"),
    ("Calibration", fill("0.key_moment", 0), "key_sum exceeds"),
    ("Calibration", put("0.key_moment", np.negative), "on its diagonal"),
    ("Calibration", set_first("0.key_moment", 0), "symmetric second moments"),
    ("Calibration", fill("0.key_rows", np.nan), "key_rows must be finite"),
    ("Calibration", fill("0.value_rows", 2), "value_rows must be from"),
    ("Calibration", put("0.query_moment", np.negative), "query_moment has"),
    ("Calibration", fill("0.queries", 0), "zero without queries"),
    ("Calibration", put("0.key_sum", lambda x: x[:, :-1]), "key_sum must have shape"),
    ("Calibration", lambda f: f.put("0.more", np.zeros(3)), "0.more is none of the format"),
    ("Calibration", lambda f: f.put("more", np.zeros(3)), "layers are numbers"),
    ("Calibration", DEEP, "levels deep"),
    ("Calibration", fact("settings", "rows", to="256"), "rows must be an integer"),
    ("Calibration", fact("settings", to=[]), "settings must be an object"),
    ("Calibration", fact("provenance", to=[]), "provenance must be an object"),
    ("Plan", fact("layers", to=[]), "layers must be an object"),
    ("Plan", fact("layers", to={}), "settings must be those of layers"),
    ("Plan", DEEP, "levels deep"),
    ("Plan", put("0.keys.forward", lambda x: x[:, :, :-1]), "must have shape"),
    ("Plan", drop("0.values.codebooks.0"), "codebooks"),
    ("Plan", fill("0.values.codebooks.0", np.nan), "codebooks.0 must be finite"),
    ("Plan", fill("0.values.codebooks.0", 1e38), "restore numbers up to"),
    ("Plan", fill("0.keys.backward", np.nan), "keys.backward must be finite"),
    ("Plan", fill("0.keys.offset", 3e38), "restore numbers up to"),
    ("Plan", fill("0.log_norm", 150), "log_norm must be from"),
    ("Plan", set_first("0.key_norms", 99), "a usual norm between"),
    ("Plan", fact("layers", "0", "rope", to={"dim": 0}), "dim must be"),
    ("Plan", fact("layers", "0", "rope", to={"dim": 2}), "a RoPE is for head_dim 2"),
    ("Plan", fact("layers", "0", "scope", to="head"), "has 2 bases of 2 heads"),
    ("Plan", fact("layers", "0", "options", "sinks", to=-1), "sinks must be an integer"),
    ("Plan", fact("layers", "0", "options", "backend", to="cupy"), "options must hold"),
    ("CrossLayerTransform", dtype("0.mean", "BF16"), "must be one of F64"),
    ("CrossLayerTransform", DEEP, "levels deep"),
    ("CrossLayerTransform", text("9" * 5000), "digits"),
    ("CrossLayerTransform", fill("0.frequencies", 0), "frequencies must be from 1"),
    ("CrossLayerTransform", set_first("0.frequencies", 2), "frequencies must sum to 32768"),
    ("CrossLayerTransform", fill("0.step", np.nan), "step must be finite"),
    ("CrossLayerTransform", fill("0.step", 0), "step must be from"),
    ("CrossLayerTransform", lambda f: f.put("0.limit", np.zeros(0, "f4")), "limit must have shape"),
    ("CrossLayerTransform", fill("0.classes", 96), "classes must be from"),
    ("CrossLayerTransform", put("0.thresholds", lambda x: x[::-1]), "thresholds must not fall"),
    ("CrossLayerTransform", fill("0.metric_roots", 0), "metric_roots must have inverses"),
    ("CrossLayerTransform", fact(*SHAPE, "rope", "scaling", "kind", to="Nothing"), "unknown scal"),
    ("CrossLayerTransform", fact(*SHAPE, "rope", "scaling", "beta_fast", to=5e-324), "beta_fast"),
    ("CrossLayerTransform", fact(*SHAPE, "rope", "scaling", "factor", to=1e-300), "radians per"),
    ("CrossLayerTransform", fact(*SHAPE, "rope", to=[]), "rope must be an object"),
    ("CrossLayerTransform", fact("groups", to=[]), "arrays of 0 groups"),
    ("CrossLayerTransform", fact("method", to="Other"), "method must be one of"),
    ("CrossLayerCalibration", fact(*SHAPE, "value_dim", to=2**31), "value_dim must be an integer"),
    ("CrossLayerCalibration", fact(*SHAPE, "value_dim", to=2**20), "rows must have shape"),
    ("CrossLayerCalibration", DEEP, "levels deep"),
    ("CrossLayerCalibration", dtype("0.moment", "BF16"), "must be one of F64"),
    ("CrossLayerCalibration", fact("groups", 0, "weighed", to=10**6), "weighed must be at most"),
    ("CrossLayerCalibration", fact("groups", 0, "weighed", to=0), "gradients must be zero"),
    ("CrossLayerCalibration", fact("groups", 0, "tokens", to=100), "rows must have shape|tags"),
    ("CrossLayerCalibration", put("0.moment", np.negative), "moment has"),
]


@pytest.mark.parametrize(("name", "change", "match"), CASES)
def test_hostile_files_are_refused(name, change, match, tmp_path):
    file = File.parse(FORMATS[name].files[0])
    change(file)
    file.seal()
    (tmp_path / "x").write_bytes(file.write())
    with pytest.raises(CalibrationError, match=match) as caught:
        FORMATS[name].load(tmp_path / "x")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", FORMATS)
def test_a_checksum_that_is_right_is_accepted(name, tmp_path):
    """What the cases above do is what is refused, and not how they are written."""
    for raw in FORMATS[name].files:
        file = File.parse(raw)
        file.metadata["sha256"] = ""
        file.seal()
        (tmp_path / "x").write_bytes(file.write())
        thing = FORMATS[name].load(tmp_path / "x")
        k, v = np.random.default_rng(0).standard_normal((2, 1, 2, 20, 4)).astype("f4")
        assert all(np.isfinite(x).all() for x in FORMATS[name].use(thing, k, v))
