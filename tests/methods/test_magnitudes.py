"""No method loses range in silence: relative errors hold from denormals to the largest numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kvcompress import (
    GroupQuantization,
    Hybrid,
    KVCacheCompressor,
    LowRank,
    RotatedQuantization,
    TransformCoding,
    VectorQuantization,
)
from kvcompress.compressor.validation import LARGEST

DIM, TOKENS = 64, 200
METHODS = {
    # Largest relative error of a token of the usual size, Euclidean, at 8 bits or so.
    GroupQuantization(8): 0.02,
    RotatedQuantization(8): 0.02,
    Hybrid(DIM, 8): 0.02,
    LowRank(DIM): 0.01,
    TransformCoding(8, exact=0.0): 0.03,
    VectorQuantization(256, 1, exact=0.0): 0.1,
}
DTYPES = {
    "float16": (np.dtype("float16"), 65504.0),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), LARGEST),
    "float32": (np.dtype("float32"), LARGEST),
}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_tokens_of_any_magnitude(method, dtype):
    kind, largest = DTYPES[dtype]
    rng = np.random.default_rng(0)
    x = np.clip(rng.standard_normal((1, 1, TOKENS, DIM)) / 4, -1, 1)
    limit = METHODS[method] + (2.0**-6 if dtype == "bfloat16" else 0.0)
    least = -14 if dtype == "float16" else -90
    for exponent in (np.log2(largest), np.log2(largest) - 4, 8, 0, -8, least + 6):
        y = np.clip(x * 2.0**exponent, -largest, largest).astype(kind)
        compressor = KVCacheCompressor(method)
        for z in compressor.decompress_kv(compressor.compress_kv(y, y)):
            error = np.linalg.norm(z.astype("float64") - y.astype("float64"), axis=-1)
            norm = np.linalg.norm(y.astype("float64"), axis=-1)
            assert np.max(error / norm) < limit, exponent


@pytest.mark.parametrize("method", [TransformCoding(8), RotatedQuantization(8)], ids=str)
@pytest.mark.parametrize("magnitude", [5000, 8000, 20000, 60000])
def test_one_large_token_keeps_its_norm(method, magnitude):
    """Its norm exceeds the largest float16."""
    x = np.random.default_rng(0).standard_normal((1, 1, 300, 128)).astype("float32")
    x[0, 0, 10] = magnitude * np.sign(x[0, 0, 10])
    y = x.astype("float16")
    compressor = KVCacheCompressor(method)
    for z in compressor.decompress_kv(compressor.compress_kv(y, y)):
        ratio = np.linalg.norm(z[0, 0, 10].astype("f8")) / np.linalg.norm(y[0, 0, 10].astype("f8"))
        assert ratio == pytest.approx(1, abs=0.03)
