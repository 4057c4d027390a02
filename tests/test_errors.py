"""Settings take integers and numbers of NumPy for those of Python, and no others for them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvcompress import (
    GroupQuantization,
    Hybrid,
    KVCacheCompressor,
    LowRank,
    Method,
    RotatedQuantization,
    TransformCoding,
    VectorQuantization,
)
from kvcompress.cross_layer.layer_group import LayerShape
from kvcompress.errors import (
    SettingError,
    check_choice,
    check_fraction,
    check_integer,
    check_number,
    check_positive,
)
from kvcompress.rope import RoPE

INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3)]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value):
    for found in (
        check_integer("n", value, 0),
        check_integer("n", value, 3, 3),
        check_choice("n", value, (2, 3), "2 or 3"),
        check_number("n", value, 0, 3),
        check_positive("n", value),
    ):
        assert (type(found), found) == (int, 3)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), "3", None, np.array([3])])
def test_what_is_no_integer(value):
    with pytest.raises(SettingError, match="n must be an integer >= 0, got "):
        check_integer("n", value, 0)
    with pytest.raises(SettingError, match="n must be 3, got "):
        check_choice("n", value, (3,), "3")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)])
def test_numbers(value):
    for check in (check_fraction, check_positive):
        assert type(check("n", value)) is float


@pytest.mark.parametrize("value", [True, np.True_, "1", None, float("nan"), float("inf"), -1])
def test_what_is_no_number(value):
    for check in (check_fraction, check_positive):
        with pytest.raises(SettingError, match="n must be"):
            check("n", value)
    with pytest.raises(SettingError, match="n must be a finite number >= 0, got"):
        check_number("n", value, 0)


def settings(integer, number):
    """Everything that is hashed, or written as JSON, of the integers and numbers given."""
    return [
        LowRank(integer(4)),
        Hybrid(integer(4), integer(3), integer(8), number(0.5)),
        GroupQuantization(integer(4), integer(8)),
        RotatedQuantization(integer(3), seed=integer(1)),
        VectorQuantization(integer(16), integer(4), number(0.5), integer(2), integer(1)),
        TransformCoding(integer(3), exact=number(0.5)),
        TransformCoding(number(2.5)),
        RoPE(integer(8), integer(10000)),
        LayerShape(integer(2), integer(8), integer(8)),
    ]


def test_settings_of_numpy_are_those_of_python():
    for found, plain in zip(settings(np.int64, np.float32), settings(int, float), strict=True):
        assert (found, hash(found), repr(found)) == (plain, hash(plain), repr(plain))
        assert json.dumps(found.to_dict()) == json.dumps(plain.to_dict())
        if isinstance(found, Method):
            assert Method.from_dict(json.loads(json.dumps(found.to_dict()))) == plain


def test_a_compressor_takes_integers_of_numpy():
    settings = {"quant_bits": 4, "sinks": 2, "window": 3}
    plain = KVCacheCompressor(LowRank(2), **settings)
    found = KVCacheCompressor(LowRank(2), **{k: np.int64(v) for k, v in settings.items()})
    assert (found, hash(found), repr(found)) == (plain, hash(plain), repr(plain))
