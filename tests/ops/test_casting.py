from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kvcompress.ops import cast

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
HARD = [0.0, -0.0, 1.0, 1 + 2.0**-11, 1 + 2.0**-9, 65504.0, 65519.0, 65520.0, -65536.0, 2.0**-24]
HARD += [2.0**-26, 1e38, -1e38]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_rounds_to_nearest_and_never_to_infinity_in_float16(xp, source, dtype):
    if not {source, dtype} <= {*xp.dtypes, "float32"}:
        pytest.skip(f"{xp} has not both dtypes, or few are tested")
    with np.errstate(over="ignore"):
        x = np.array(HARD, "float32").astype(DTYPES[source])
        expected = x.astype("float32").astype(DTYPES[dtype])
    if dtype == "float16" != source:
        expected = np.clip(expected, -65504, 65504)
    y = xp.run(cast, xp.asarray(x), dtype=dtype)
    assert xp.owns(y)
    np.testing.assert_array_equal(xp.numpy(y), expected)
    np.testing.assert_array_equal(np.signbit(xp.numpy(y)), np.signbit(expected))


def test_what_has_the_dtype_is_not_copied():
    x = np.ones(3, "float16")
    assert cast(x, dtype="float16") is x
