"""Entropy coding: against an oracle in Python's integers, its cost, damaged words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.entropy.context_model import (
    CLASSES,
    LARGEST,
    OCTAVE,
    REACH,
    SYMBOLS,
    ContextModel,
    classes_of,
    fit,
    level_frequencies,
    token_levels,
)
from kvcompress.entropy.rans import PRECISION, TOTAL, Decoder, Encoder
from kvcompress.errors import CodingError


def table(rng: np.random.Generator, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and frequencies of symbols, some of them very rare."""
    share = rng.random(symbols) ** 8
    frequency = 1 + np.floor(share / share.sum() * (TOTAL - symbols)).astype(np.int64)
    frequency[np.argmax(frequency)] += TOTAL - frequency.sum()
    return np.cumsum(frequency) - frequency, frequency


def oracle(symbols: list[int], start: np.ndarray, frequency: np.ndarray) -> list[int]:
    """Words of one lane: rANS as the paper writes it, in Python's integers."""
    state, words = 1 << 16, []
    for symbol in reversed(symbols):
        f, c = int(frequency[symbol]), int(start[symbol])
        if state >= f << (32 - PRECISION):
            words.append(state & 0xFFFF)
            state >>= 16
        state = (state // f << PRECISION) + state % f + c
    return [state >> 16, state & 0xFFFF, *reversed(words)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 200))
def test_oracle_and_round_trip(seed, lanes, steps):
    rng = np.random.default_rng(seed)
    start, frequency = table(rng, 7)
    symbols = rng.choice(7, p=frequency / TOTAL, size=(steps, lanes))
    coder = Encoder(lanes)
    for row in symbols:
        coder.push(start[row], frequency[row])
    words, lengths = coder.finish()
    pieces = np.split(words, np.cumsum(lengths)[:-1])
    for lane, piece in enumerate(pieces):
        assert piece.tolist() == oracle(symbols[:, lane].tolist(), start, frequency)
    decoder = Decoder(words, lengths)
    of_slot = np.repeat(np.arange(7), frequency)
    for row in symbols:
        slot = decoder.slot()
        found = of_slot[slot]
        np.testing.assert_array_equal(found, row)
        decoder.take(start[found].astype("uint32"), frequency[found].astype("uint32"), slot)
    decoder.finish()


def test_cost():
    """Within half a percent of the entropy, but for the state at the end."""
    rng = np.random.default_rng(0)
    start, frequency = np.array([0, TOTAL - 60]), np.array([TOTAL - 60, 60])
    symbols = (rng.random((4000, 100)) < 60 / TOTAL).astype(int)
    coder = Encoder(100)
    for row in symbols:
        coder.push(start[row], frequency[row])
    words, _ = coder.finish()
    entropy = -np.sum(np.log2(frequency[symbols] / TOTAL))
    assert entropy - 16 * 100 < 16 * words.size - 16 * 100 < 1.005 * entropy + 16 * 100


def model(seed: int = 0) -> ContextModel:
    rng = np.random.default_rng(seed)
    size = np.geomspace(30, 0.05, 60)
    q = np.rint(rng.laplace(size=(60, 400)) * size[:, None]).astype(np.int32)
    return fit(q, classes_of(size))


def test_tables_are_sound():
    known = model()
    assert known.frequencies.shape == (CLASSES, SYMBOLS)
    assert np.all(known.frequencies >= 1)
    assert np.all(known.frequencies.astype(int).sum(1) == TOTAL)
    small = known.frequencies[:40]
    np.testing.assert_array_equal(small[:, :-1], small[:, -2::-1])
    assert np.all(np.diff(known.thresholds) > 0)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.integers(1, 9),
    st.sampled_from([0.01, 1.0, 1e3, 1e9]),
    st.booleans(),
)
def test_coefficients_round_trip(seed, components, tokens, size, apart):
    """Whatever they are, and whatever their classes and levels: nothing is lost."""
    rng = np.random.default_rng(seed)
    q = np.rint(rng.standard_t(1.5, (components, tokens)) * size)
    q = np.clip(q, -(2**31) + 1, 2**31 - 1).astype(np.int32)
    shape = (components, tokens) if apart else (components,)
    classes = rng.integers(0, CLASSES, shape).astype(np.uint8)
    levels = rng.integers(-REACH, REACH + 1, tokens)
    coder = Encoder(tokens)
    known = model()
    known.push(coder, q, classes, levels)
    words, lengths = coder.finish()
    decoder = Decoder(words, lengths)
    np.testing.assert_array_equal(known.pull(decoder, classes, tokens, levels), q)
    decoder.finish()
    bits = known.bits(q, classes, levels)
    assert 16 * words.size <= 1.01 * bits + 32 * tokens + 16 * tokens


def test_tokens_adapt():
    """A token ten times as large as usual costs less than its components by themselves."""
    rng = np.random.default_rng(3)
    size = np.geomspace(8, 0.1, 400)
    usual = rng.laplace(size=(400, 600)) * size[:, None] / np.sqrt(2)
    known, classes = fit(np.rint(usual).astype(np.int32), classes_of(size)), classes_of(size)
    loud = np.rint(10 * usual[:, :50]).astype(np.int32)
    alone = known.frequencies[classes].astype(float)
    symbol = np.where(np.abs(loud) <= LARGEST, loud + LARGEST, SYMBOLS - 1)
    costs = PRECISION - np.log2(np.take_along_axis(alone, symbol, axis=1))
    static = float(costs.sum()) + 33 * np.sum(symbol == SYMBOLS - 1)
    assert known.bits(loud, classes) < 0.8 * static


def test_levels():
    """Steps follow the root of the importance, and tokens start from what theirs let expect."""
    importance = np.array([-100, -1.0, -0.24, 0, 0.5, 2, 100])
    levels = token_levels(importance)
    np.testing.assert_array_equal(levels, [-REACH, -2, 0, 0, 1, 4, REACH])
    frequencies = level_frequencies(levels)
    assert frequencies.min() >= 1
    assert frequencies.astype(int).sum() == TOTAL
    rng, size = np.random.default_rng(3), np.geomspace(8, 0.1, 64)
    usual = rng.laplace(size=(64, 900)) * size[:, None] / np.sqrt(2)
    known, classes = fit(np.rint(usual).astype(np.int32), classes_of(size)), classes_of(size)
    fine = np.rint(usual[:, :300] * 2.0 ** (8 / OCTAVE)).astype(np.int32)
    costs = [known.bits(fine, classes, np.full(300, level)) for level in (0, 8)]
    assert costs[1] < 0.99 * costs[0]


@pytest.mark.parametrize("damage", ["short", "long", "flipped"])
def test_damaged(damage):
    coder, known = Encoder(3), model()
    q = np.arange(-30, 30, dtype=np.int32).reshape(20, 3)
    classes = np.full(20, 40, np.uint8)
    known.push(coder, q, classes)
    words, lengths = coder.finish()
    if damage == "short":
        words = words[:-1]
    elif damage == "long":
        words = np.append(words, np.uint16(0))
    else:
        words[2] ^= 0x5A5A

    def decode() -> None:
        decoder = Decoder(words, lengths)
        known.pull(decoder, classes, 3)
        decoder.finish()

    with pytest.raises(CodingError, match="damaged"):
        decode()
