"""Codes of different widths: who gets the bits, and what the codes say."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.ops import allocate, dequantize_allocated, quantize_allocated
from kvcompress.ops.allocated import round_allocated
from kvcompress.ops.lloyd_max import distortions, levels


def greedy(variances, bits):
    """Bit by bit, in float64, to whom it helps most."""
    table = distortions().astype("float64")
    component_bits = np.zeros(len(variances), dtype=int)
    for _ in range(bits):
        gain = [
            v * (table[d] - table[d + 1]) if d < 8 else -1.0
            for v, d in zip(variances, component_bits, strict=True)
        ]
        component_bits[int(np.argmax(gain))] += 1
    return component_bits, float(np.sum(variances * table[component_bits]))


@given(
    st.lists(st.floats(2.0**-20, 1.0, width=32), min_size=1, max_size=9),
    st.integers(0, 72),
)
def test_bits_go_where_they_help_most(variances, bits):
    bits = min(bits, 8 * len(variances))
    x = np.array([variances, variances[::-1]], dtype="float32")
    component_bits = allocate(x, bits)
    assert component_bits.dtype == np.uint8
    assert (component_bits.sum(1) == bits).all()
    assert component_bits.max() <= 8
    for row, found in zip(x.astype("float64"), component_bits, strict=True):
        _, least = greedy(row, bits)
        error = np.sum(row * distortions().astype("float64")[found])
        assert error <= least * (1 + 1e-5)


def test_distortions_fall_ever_slower():
    table = distortions().astype("float64")
    np.testing.assert_allclose(table[:5], [1, 0.3634, 0.1175, 0.03454, 0.009497], rtol=2e-3)
    gains = table[:-1] - table[1:]
    assert (gains[1:] < gains[:-1]).all()


@pytest.mark.parametrize("bits", [1, 7, 8, 19, 40])
def test_codes_against_loops(xp, bits):
    rng = np.random.default_rng(bits)
    heads, tokens, channels = 3, 17, 5
    x = rng.standard_normal((heads, tokens, channels)).astype("float32")
    x[0, :3, 0] = [1e30, -1e30, 0.0]
    component_bits = np.stack([greedy(rng.random(channels) + 0.01, bits)[0] for _ in range(heads)])
    component_bits = component_bits.astype("uint8")
    packed = xp.run(quantize_allocated, xp.asarray(x), xp.asarray(component_bits), bits=bits)
    assert xp.owns(packed)
    found = xp.numpy(packed)
    decoded = xp.run(dequantize_allocated, packed, xp.asarray(component_bits), bits=bits)
    decoded = xp.numpy(decoded)
    assert (decoded.dtype, decoded.shape) == (np.float32, x.shape)
    rounded = xp.numpy(xp.run(round_allocated, xp.asarray(x), xp.asarray(component_bits)))
    np.testing.assert_array_equal(rounded, decoded)
    for h in range(heads):
        for t in range(tokens):
            slots = []
            for c, depth in enumerate(component_bits[h]):
                if depth == 0:
                    assert decoded[h, t, c] == 0
                    continue
                book = levels(int(depth)).astype("float64")
                code = int(np.flatnonzero(book == decoded[h, t, c])[0])
                # Thresholds are rounded to 2**-10.
                distance = abs(book - float(x[h, t, c]))
                assert distance[code] <= distance.min() + 2.0**-9
                slots += [code >> i & 1 for i in range(depth)]
            assert found[h, t].tolist() == oracle.pack(slots, 1)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (1, 1, 1)])
def test_empty(xp, shape):
    x = np.zeros(shape, dtype="float32")
    component_bits = allocate(xp.asarray(np.ones((shape[0], shape[2]), dtype="float32")), 2)
    packed = xp.run(quantize_allocated, xp.asarray(x), component_bits, bits=2)
    assert tuple(packed.shape) == (shape[0], shape[1], 1)
    assert tuple(xp.run(dequantize_allocated, packed, component_bits, bits=2).shape) == shape
