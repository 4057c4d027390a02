"""Whatever a calibration accepted, its file loads: the rules refuse nothing that is ours."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz.formats import formats
from hypothesis import example, given
from hypothesis import strategies as st

from kvcompress import Calibration, CrossLayerCalibration, CrossLayerTransform, Plan, plan
from kvcompress.cross_layer import LayerGroup, LayerShape
from kvcompress.errors import CalibrationError, KVCompressError, NonFiniteError, SettingError

KINDS = ("normal", "zero", "constant", "sparse", "equal tokens")


def draw(rng, kind, octaves, *shape):
    x = rng.standard_normal(shape)
    if kind == "zero":
        x[...] = 0
    elif kind == "constant":
        x[...] = 1
    elif kind == "sparse":
        x *= rng.random(shape) < 0.02
    elif kind == "equal tokens":
        x[...] = x[:, :, :1]
    return (x * 2.0**octaves).astype("f4")


octaves = st.sampled_from([0, 0, 0, -100, -30, 20, 47, 100])
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)


@given(seeds, kinds, kinds, kinds, octaves, octaves, octaves, st.integers(0, 300), st.booleans())
@example(0, "normal", "normal", "normal", 100, 100, 100, 300, True)
@example(0, "zero", "zero", "zero", 0, 0, 0, 300, True)
def test_calibrations(
    tmp_path_factory, seed, a, b, c, key_scale, value_scale, query_scale, tokens, queries
):
    path, rng = tmp_path_factory.mktemp("files") / "x", np.random.default_rng(seed)
    made = Calibration(rows=256, skip=0)
    for _ in range(2):
        k = draw(rng, a, key_scale, 1, 2, tokens, 4)
        v = draw(rng, b, value_scale, 1, 2, tokens, 4)
        q = draw(rng, c, query_scale, 1, 2, tokens, 4)
        made.update(3, k, v, q if queries else None)
    made.save(path)
    again = Calibration.load(path)
    assert again.fingerprint == made.fingerprint
    try:
        planned = plan(again, bits=2)
    except CalibrationError:
        return  # fewer than 256 tokens, or numbers that float32 cannot carry
    planned.save(path)
    assert Plan.load(path)[3].method.parameters == planned[3].method.parameters


@given(seeds, kinds, kinds, kinds, octaves, octaves, octaves, st.integers(0, 300), st.booleans())
@example(0, "normal", "normal", "normal", 0, 0, 0, 300, True)
@example(0, "normal", "normal", "zero", 0, 0, 0, 300, True)
@example(0, "normal", "normal", "sparse", 0, 0, -100, 300, True)
def test_calibrations_of_layer_groups(
    tmp_path_factory, seed, a, b, c, key_scale, value_scale, gradient_scale, tokens, gradients
):
    path, rng = tmp_path_factory.mktemp("files") / "x", np.random.default_rng(seed)
    made = CrossLayerCalibration([LayerGroup((0,), (LayerShape(2, 4, 2),))], rows=256, skip=0)
    for _ in range(2):
        ks, vs = (
            [draw(rng, a, key_scale, 1, 2, tokens, 4)],
            [draw(rng, b, value_scale, 1, 2, tokens, 2)],
        )
        by = [draw(rng, c, gradient_scale, *x.shape) for x in (ks[0], vs[0])]
        if rng.random() < 0.5:
            by[0][:, 1] = 0  # a head that nothing reads
        try:
            made.update(ks, vs, ([by[0]], [by[1]]) if gradients else None)
        except NonFiniteError:
            return
    made.save(path)
    again = CrossLayerCalibration.load(path)
    assert again.fingerprint == made.fingerprint
    try:
        trained = again.train(1.0)
    except (CalibrationError, SettingError):
        return  # too few tokens, or no coefficients that could spend a bit
    trained.save(path)
    assert CrossLayerTransform.load(path) == trained


@pytest.mark.parametrize("name", ["Calibration", "CrossLayerCalibration"])
def test_calibrations_of_nothing(name, tmp_path):
    """They are saved and loaded; only what needs tokens says that there are none."""
    made = Calibration(rows=256) if name == "Calibration" else CrossLayerCalibration([])
    made.save(tmp_path / "x")
    again = formats()[name].load(tmp_path / "x")
    assert again.tokens == 0
    with pytest.raises(KVCompressError):
        plan(again, bits=2) if name == "Calibration" else again.train(1.0)
