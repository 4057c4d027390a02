"""No method returns numbers that are not finite for finite keys and values, whatever they are."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompress import Hybrid, KVCacheCompressor, LowRank, TransformCoding
from kvcompress.cli.presets import presets

DIM, TOKENS = 16, 40


def kinds(rng):
    """Tensors ``[1, 2, tokens, head_dim]`` whose covariances have lost their rank, by name."""
    shape = (1, 2, TOKENS, DIM)
    row, other = rng.standard_normal((2, 1, 1, 1, DIM))
    column = rng.standard_normal((1, 2, TOKENS, 1))
    return {
        "identical tokens": np.broadcast_to(row, shape),
        "rank 1": column * row,
        "rank 1 and a little noise": column * row + 1e-7 * rng.standard_normal(shape),
        "two tokens": np.where(column < 0, row, other) + np.zeros(shape),
        "far from zero": 1e4 + 1e-3 * rng.standard_normal(shape),
        "one channel": rng.standard_normal(shape) * (np.arange(DIM) == 3),
        "one large token": rng.standard_normal(shape)
        * np.where(np.arange(TOKENS) == 7, 1e4, 1e-3)[:, None],
        "tiny": 1e-30 * rng.standard_normal(shape),
        "constant": np.full(shape, 0.7),
    }


@pytest.mark.parametrize("name", list(presets([DIM])))
def test_finite(xp, name):
    methods = presets([DIM])[name]
    methods = methods[:1] if xp.is_jax else methods
    for seed in range(1 if xp.is_jax else 3):
        for kind, x in kinds(np.random.default_rng(seed)).items():
            for dtype in xp.dtypes[:1] if xp.is_jax else {"float32", "float16"} & set(xp.dtypes):
                y = xp.asarray(x.astype(dtype))
                for method in methods:
                    compressor = KVCacheCompressor(method)
                    compressed = xp.run(compressor.compress_kv, y, y)
                    for z in xp.run(compressor.decompress_kv, compressed):
                        assert np.isfinite(xp.numpy(z).astype("float64")).all(), (kind, method)


@pytest.mark.parametrize("method", [LowRank(32), Hybrid(64, 4), TransformCoding(2)], ids=str)
def test_identical_tokens_come_back(xp, method):
    """Of the first layer, where a token repeats, and of padding."""
    compressor = KVCacheCompressor(method)
    for seed in range(2 if xp.is_jax else 20):
        row = np.random.default_rng(seed).standard_normal((1, 1, 1, 64))
        x = np.broadcast_to(row, (1, 1, 40, 64)).astype("float32")
        y = xp.asarray(x)
        k, v = xp.run(compressor.decompress_kv, xp.run(compressor.compress_kv, y, y))
        for z in (k, v):
            assert np.linalg.norm(xp.numpy(z) - x) < 2e-2 * np.linalg.norm(x)
