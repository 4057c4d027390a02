"""Calibration: streaming sums against NumPy at once, merging, files, errors."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompress import Calibration
from kvcompress.errors import CalibrationError, DTypeError, NonFiniteError, ShapeError, UnknownLayer


def make(tokens: int, seed: int, batch: int = 2):
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((batch, 2, tokens, 6)) + 1
    v = rng.standard_normal((batch, 2, tokens, 5))
    v[:, :, 10] = 0
    q = rng.standard_normal((batch, 4, tokens, 6))
    return tuple(x.astype("float32") for x in (k, v, q))


def test_moments(xp):
    calibration = Calibration(rows=512, skip=3)
    parts = [make(100, seed) for seed in range(3)]
    for part in parts:
        calibration.update(2, *map(xp.asarray, part))
    k, v, q = (np.concatenate(x).astype("float64") for x in zip(*parts, strict=True))
    k, v = (x[:, :, 3:].transpose(1, 0, 2, 3).reshape(2, -1, x.shape[-1]) for x in (k, v))
    q = q.reshape(6, 2, 200, 6).transpose(1, 0, 2, 3).reshape(2, -1, 6)
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    statistics = calibration[2]
    key_covariance = statistics.key_covariance.reshape(2, 6, 2, 6)
    value_covariance = statistics.value_covariance.reshape(2, 5, 2, 5)
    joint = np.cov(np.concatenate([k[0], k[1]], axis=-1).T, bias=True)
    np.testing.assert_allclose(statistics.key_covariance, joint, atol=1e-12)
    for h in range(2):
        kept = norm[h, :, 0] > 0
        unit = v[h][kept] / norm[h][kept]
        np.testing.assert_allclose(statistics.key_mean[h], k[h].mean(0))
        np.testing.assert_allclose(key_covariance[h, :, h], np.cov(k[h].T, bias=True))
        np.testing.assert_allclose(statistics.query_moment[h], q[h].T @ q[h] / len(q[h]))
        np.testing.assert_allclose(statistics.value_mean[h], unit.mean(0))
        np.testing.assert_allclose(value_covariance[h, :, h], np.cov(unit.T, bias=True))
        np.testing.assert_allclose(statistics.value_log_norm[h], np.log2(norm[h][kept]).mean())
    assert calibration.tokens == 3 * 2 * 97
    assert calibration.layers == (2,)
    # Every row is the key, and the unit value, of one and the same token.
    assert statistics.key_rows.shape == (2, 512, 6)
    for row, unit in zip(statistics.key_rows[0, :20], statistics.value_rows[0, :20], strict=True):
        token = np.argmin(((k[0] - row) ** 2).sum(-1))
        np.testing.assert_allclose(k[0, token], row, atol=2e-3)
        np.testing.assert_allclose(v[0, token] / max(norm[0, token, 0], 1e-30), unit, atol=1e-3)


def test_order_and_parts_do_not_matter():
    whole, merged = Calibration(rows=256, seed=1), Calibration(rows=256, seed=1)
    other = Calibration(rows=256, seed=2)
    first, second = make(90, 0), make(90, 1)
    whole.update(0, *first)
    whole.update(0, *second)
    merged.update(0, *first)
    other.update(0, *second)
    merged = merged.merge(other)
    for name in ("key_mean", "key_covariance", "query_moment", "value_covariance"):
        np.testing.assert_allclose(getattr(whole[0], name), getattr(merged[0], name), rtol=1e-12)
    assert merged[0].key_rows.shape == (2, 256, 6)
    with pytest.raises(CalibrationError, match="different seeds"):
        whole.merge(whole)


def test_file(tmp_path):
    calibration = Calibration(rows=256)
    calibration.update(0, *make(200, 0))
    calibration.update(11, *make(200, 1))
    calibration.save(tmp_path / "a.safetensors")
    again = Calibration.load(tmp_path / "a.safetensors")
    assert again.fingerprint == calibration.fingerprint
    assert again[11] == calibration[11] != calibration[0]
    assert (again.layers, again.tokens, again.rows) == ((0, 11), calibration.tokens, 256)
    # What was loaded streams on as if it had never been a file.
    for c in (again, calibration):
        c.update(0, *make(200, 3))
    assert again[0] == calibration[0]


def test_damaged_files(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("no calibration")
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(CalibrationError, match="is not a calibration"):
            Calibration.load(tmp_path / name)


def test_errors_change_nothing():
    calibration = Calibration(rows=256)
    k, v, q = make(200, 0)
    calibration.update(0, k, v, q)
    before = calibration.fingerprint
    bad = k.copy()
    bad[0, 1, 2, 3] = np.nan
    for arrays, error in (
        ((bad, v), NonFiniteError),
        ((k[:, :1], v), ShapeError),
        ((k, v, q[:, :3]), ShapeError),
        ((k[..., :5], v), ShapeError),
        ((k[0, 0], v[0, 0]), ShapeError),
        ((k.astype("float64"), v), DTypeError),
    ):
        with pytest.raises(error):
            calibration.update(0, *arrays)
    assert calibration.fingerprint == before
    with pytest.raises(UnknownLayer, match="no statistics"):
        calibration[1]
    few = Calibration(rows=256)
    few.update(0, *make(50, 0))
    with pytest.raises(CalibrationError, match="256 are the least"):
        few[0]
