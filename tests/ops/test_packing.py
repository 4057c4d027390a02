from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.ops import pack, packed_size, unpack
from kvcompress.ops.packing import code_dtype

BITS = range(1, 17)
LENGTHS = (29, 16, 1)  # few, for a compiler meets every shape; test_round_trip has them all


def random_codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(code_dtype(bits))


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_the_documented_one(xp, bits):
    for n in xp.few(LENGTHS):
        check_layout(xp, bits, n)


def check_layout(xp, bits, n):
    codes = random_codes((2, 3, n), bits, seed=n)
    packed = xp.run(pack, xp.asarray(codes), bits=bits)
    assert xp.owns(packed)
    expected = oracle.pack_rows(codes, bits)
    assert packed.shape == expected.shape == (2, 3, packed_size(n, bits))
    np.testing.assert_array_equal(xp.numpy(packed), expected, strict=True)
    back = xp.run(unpack, packed, bits=bits, n=n)
    np.testing.assert_array_equal(xp.numpy(back), codes, strict=True)


def test_layout_by_hand():
    # 3 bits are a plane of 2 bits and one of 1; 5 codes take 2 bytes and 1.
    codes = np.array([0b101, 0b010, 0b111, 0b000, 0b110], "uint8")
    packed = pack(codes, 3)
    # First plane, m = 2: byte 0 holds codes 0, 2, 4 and byte 1 codes 1, 3, two low bits of each.
    # Second plane, m = 1: the high bits of codes 0 to 4, lowest first.
    assert packed.tolist() == [0b00_10_11_01, 0b00_00_00_10, 0b00010101]


@given(st.data())
def test_round_trip(data):
    bits = data.draw(st.sampled_from(BITS))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    row = np.array(codes, code_dtype(bits))
    packed = pack(row, bits)
    assert packed.tolist() == oracle.pack(codes, bits)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed, bits, len(codes)), row, strict=True)


@pytest.mark.parametrize("bits", BITS)
def test_no_bit_is_wasted(bits):
    # A multiple of 8 codes fills its bytes.
    assert packed_size(64, bits) == 8 * bits
    assert packed_size(0, bits) == 0
    assert packed_size(1, bits) == len(oracle.planes(bits))


@pytest.mark.parametrize("bits", [3, 8])
def test_int32_codes_pack_like_uint8_ones(xp, bits):
    codes = random_codes((3, 13), bits).astype("int32")
    packed = xp.run(pack, xp.asarray(codes), bits=bits)
    np.testing.assert_array_equal(xp.numpy(packed), oracle.pack_rows(codes, bits))


def test_every_row_is_packed_alone(xp):
    codes = random_codes((4, 5, 13), 3)
    packed = xp.numpy(pack(xp.asarray(codes), 3))
    for i in np.ndindex(4, 5):
        np.testing.assert_array_equal(pack(codes[i], 3), packed[i])


def test_arguments_are_left_alone(xp):
    codes = random_codes((4, 16), 8)  # 8 bits: nothing to do, yet the result must be no view
    array = xp.asarray(codes)
    packed = pack(array, 8)
    unpack(packed, 8, 16)
    np.testing.assert_array_equal(xp.numpy(array), codes)
