"""How likely coefficients are, in integer tables, and their entropy coding; on the host.

Coefficients of about the same size share a class, which has a table of frequencies. The class of a
coefficient is that of its component, moved by the magnitudes of the components of the same token
before it: tokens unlike those of the calibration cost more bits for their first components only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.entropy.rans import PRECISION, TOTAL, Decoder, Encoder
from kvcompress.errors import CodingError

LARGEST = 15
"""Largest magnitude that has a symbol; what exceeds it follows in bits of its own."""

SYMBOLS = 2 * LARGEST + 2

CLASSES = 96
"""Classes of coefficients: four an octave."""

OCTAVE = 4
"""Classes to an octave of size."""

SMALLEST = -8
"""Binary logarithm of the size of the first class, in steps of the quantizer."""

DOWN = 12
"""Classes that a token may be below the usual."""

UP = 16
"""Classes that a token may be above the usual."""

REACH = 12
"""Levels of tokens are from minus this to this: their steps are as many classes finer."""

GROUP = 16
"""Components that are coded by the same knowledge of the token."""

_UNIT = 256
"""What `ContextModel.magnitudes` count in: parts of a step."""

_SCALE = 1 << 16

_ROOTS = (65536, 77936, 92682, 110218)
"""Powers of two with exponents of 0, 1, 2, 3 quarters, times `_SCALE`."""

_MEMORY = 8
"""Groups over which what was seen of a token is averaged."""

_MOST = 1 << 15
"""Magnitudes that count as this where tokens are compared."""

LOW_BITS = np.maximum(0, (np.arange(CLASSES) // OCTAVE + SMALLEST - 2)).astype(np.int32)
"""Bits of the coefficients of every class that are as good as random, and coded as such."""

_PRIOR = 30
"""Weight, in coefficients, of the Laplace distribution that tables start from."""

_RAW = (11, 11, 11)
"""Bits to each step of what has no symbol: 32, and its sign."""


@dataclass(frozen=True, eq=False)
class ContextModel:
    """Integer tables that decide how coefficients are coded.

    Attributes
    ----------
    frequencies : array ``[CLASSES, SYMBOLS]``, uint16
        Of the coefficients from -LARGEST to LARGEST and of all others; rows sum to ``2**15``.
    magnitudes : array ``[CLASSES]``, int64
        Mean magnitude, in 256th of a step.
    thresholds : array ``[moves]``, int64
        Ratios of what was seen to what was to be expected, times ``2**16``, between which the
        class moves by one.
    """

    frequencies: HostArray
    magnitudes: HostArray
    thresholds: HostArray

    def push(
        self, coder: Encoder, q: HostArray, classes: HostArray, levels: HostArray | None = None
    ) -> None:
        """Code coefficients.

        Parameters
        ----------
        coder : Encoder
            Of as many lanes as there are tokens.
        q : int32 array ``[components, tokens]``
        classes : integer array ``[components]`` or ``[components, tokens]``
        levels : integer array ``[tokens]``, optional
            From `token_levels`; zero if left out.
        """

        def visit(component: int, cls: HostArray) -> HostArray:
            row: HostArray = q[component]
            bits = LOW_BITS[cls]
            high = row >> bits
            plain = np.abs(high) <= LARGEST
            symbol = np.where(plain, high + LARGEST, SYMBOLS - 1)
            at = cls * SYMBOLS + symbol
            coder.push(self._flat_starts[at], self._flat_frequencies[at])
            if not plain.all():
                _push_raw(coder, np.where(plain, 0, high), ~plain)
            if bits.any():
                coder.push_bits(row - (high << bits), bits)
            return row

        self._walk(visit, classes, _starts(levels, q.shape[1]))

    def pull(
        self,
        coder: Decoder,
        classes: HostArray,
        tokens: int,
        levels: HostArray | None = None,
    ) -> HostArray:
        """Undo `push`: int32 ``[components, tokens]``.

        Raises
        ------
        CodingError
            If what is decoded cannot have been encoded.
        """

        def visit(_: int, cls: HostArray) -> HostArray:
            slot = coder.slot()
            symbol = self._symbols[cls * TOTAL + slot]
            at = cls * SYMBOLS + symbol
            coder.take(self._flat_starts[at], self._flat_frequencies[at], slot)
            high: HostArray = symbol.astype(np.int32) - LARGEST
            escaped = symbol == SYMBOLS - 1
            if escaped.any():
                high = np.where(escaped, _pull_raw(coder, escaped), high)
            bits = LOW_BITS[cls]
            if bits.any():
                high = (high << bits) + coder.bits(bits)
            return high

        return self._walk(visit, classes, _starts(levels, tokens))

    def histogram(
        self, q: HostArray, classes: HostArray, levels: HostArray | None = None
    ) -> HostArray:
        """How often every symbol comes, ``[CLASSES, SYMBOLS]``, in coefficients as for `push`."""
        counts = np.zeros(CLASSES * SYMBOLS, np.int64)

        def visit(component: int, cls: HostArray) -> HostArray:
            row: HostArray = q[component]
            high = row >> LOW_BITS[cls]
            symbol = np.where(np.abs(high) <= LARGEST, high + LARGEST, SYMBOLS - 1)
            counts[:] += np.bincount(cls * SYMBOLS + symbol, minlength=counts.size)
            return row

        self._walk(visit, classes, _starts(levels, q.shape[1]))
        return counts.reshape(CLASSES, SYMBOLS)

    def bits(self, q: HostArray, classes: HostArray, levels: HostArray | None = None) -> float:
        """Bits that the tables say coefficients cost: what `push` comes close to."""
        counts = self.histogram(q, classes, levels)
        costs = PRECISION - np.log2(self.frequencies.astype(np.float64))
        costs[:, -1] += sum(_RAW)
        return float(np.sum(counts * (costs + LOW_BITS[:, None])))

    def _walk(
        self, visit: Callable[[int, HostArray], HostArray], classes: HostArray, seen: HostArray
    ) -> HostArray:
        """Return what `visit` returns for every component and the classes of its numbers."""
        tokens = seen.size
        rows = np.empty((len(classes), tokens), np.int32)
        expected = np.full(tokens, _SCALE)
        for start in range(0, len(classes), GROUP):
            base = classes[start : start + GROUP].astype(np.int64)
            base = base[:, None] if base.ndim == 1 else base
            move = np.searchsorted(self.thresholds, seen * _SCALE // expected, side="right") - DOWN
            moved = np.clip(base + move, 0, CLASSES - 1)
            total = np.zeros(tokens, np.int64)
            for i, cls in enumerate(moved, start):
                rows[i] = visit(i, cls)
                total += np.minimum(np.abs(rows[i].astype(np.int64)), _MOST)
            # Groups of which little is expected say little.
            usual = self.magnitudes[base].sum(0)
            weight = _SCALE // np.maximum(usual, _UNIT)
            seen = seen + total * (_UNIT * weight) - seen // _MEMORY
            expected = expected + usual * weight - expected // _MEMORY
        return rows

    @cached_property
    def _flat_frequencies(self) -> HostArray:
        return self.frequencies.ravel().astype(np.uint32)

    @cached_property
    def _flat_starts(self) -> HostArray:
        wide = self.frequencies.astype(np.uint32)
        starts: HostArray = (np.cumsum(wide, axis=1, dtype=np.uint32) - wide).ravel()
        return starts

    @cached_property
    def _symbols(self) -> HostArray:
        """Symbol of every slot of every class."""
        rows = [np.repeat(np.arange(SYMBOLS, dtype=np.uint8), row) for row in self.frequencies]
        return np.concatenate(rows)


def _push_raw(coder: Encoder, high: HostArray, escaped: HostArray) -> None:
    """Code what has no symbol, where `escaped`."""
    value = high.astype(np.int64) + (1 << 32)
    for bits in _RAW:
        coder.push_bits(value & ((1 << bits) - 1), np.where(escaped, bits, 0))
        value >>= bits


def _pull_raw(coder: Decoder, escaped: HostArray) -> HostArray:
    """Undo `_push_raw`."""
    value, place = np.zeros(escaped.shape, np.int64), 0
    for bits in _RAW:
        value += coder.bits(np.where(escaped, bits, 0)) << place
        place += bits
    high = value - (1 << 32)
    if np.any(np.abs(high[escaped]) > 2**31 - 1):
        raise CodingError("a coefficient exceeds 32 bits; the payload is damaged")
    return high.astype(np.int32)


def classes_of(sizes: HostArray) -> HostArray:
    """Classes, uint8, of coefficients of these root mean squares, in steps of the quantizer."""
    octaves = np.log2(np.maximum(sizes, 2.0**SMALLEST)) - SMALLEST
    classes: HostArray = np.clip(np.rint(octaves * OCTAVE), 0, CLASSES - 1).astype(np.uint8)
    return classes


def token_levels(importance: HostArray) -> HostArray:
    """Levels of tokens, int64, from binary logarithms of their importance.

    The distortion is the importance times the square of the step: steps follow its root.
    """
    levels: HostArray = np.clip(np.rint(importance * (OCTAVE / 2)), -REACH, REACH).astype(np.int64)
    return levels


def level_frequencies(levels: HostArray) -> HostArray:
    """Frequencies, uint16, of the levels of tokens, summing to ``2**15``."""
    counts = np.bincount(levels + REACH, minlength=2 * REACH + 1) + 1.0
    frequencies = 1 + np.floor(counts / counts.sum() * (TOTAL - counts.size)).astype(np.int64)
    frequencies[REACH] += TOTAL - frequencies.sum()
    narrow: HostArray = frequencies.astype(np.uint16)
    return narrow


def _starts(levels: HostArray | None, tokens: int) -> HostArray:
    """Magnitudes expected of tokens at first: larger for tokens of finer steps."""
    if levels is None:
        return np.full(tokens, _SCALE)
    octave, quarter = np.divmod(levels, OCTAVE)
    starts: HostArray = (np.asarray(_ROOTS)[quarter] << REACH >> (REACH - octave)).astype(np.int64)
    return starts


def fit(q: HostArray, classes: HostArray, levels: HostArray | None = None) -> ContextModel:
    """Train tables on coefficients.

    Parameters
    ----------
    q : int32 array ``[components, tokens]``
    classes : array ``[components]``
        From `classes_of`.
    levels : array ``[tokens]``, optional
        From `token_levels`; zero if left out.
    """
    size = 2.0 ** (np.arange(CLASSES) / OCTAVE + SMALLEST)
    prior = _laplace(size)
    usual = np.arange(-LARGEST, LARGEST + 1) << LOW_BITS[:, None].astype(np.int64)
    expected = np.sum(prior[:, :-1] * np.abs(usual), axis=1) * _PRIOR
    count = np.full(CLASSES, float(_PRIOR))
    np.add.at(expected, classes, np.minimum(np.abs(q), _MOST).sum(1))
    np.add.at(count, classes, q.shape[1])
    moves = np.arange(-DOWN, UP) + 0.5
    model = ContextModel(
        np.full((CLASSES, SYMBOLS), TOTAL // SYMBOLS, np.uint16),
        np.rint(_UNIT * expected / count).astype(np.int64),
        np.rint(_SCALE * 2.0 ** (moves / OCTAVE)).astype(np.int64),
    )
    return replace(
        model, frequencies=_integers(model.histogram(q, classes, levels) + _PRIOR * prior)
    )


def _laplace(size: HostArray) -> HostArray:
    """Probabilities ``[classes, SYMBOLS]`` of symbols, were coefficients Laplacian."""
    step = 2.0 ** LOW_BITS[:, None]
    edges = np.arange(-LARGEST, LARGEST + 2) * step - 0.5
    below = np.exp(-np.abs(edges) * np.sqrt(2) / size[:, None]) / 2
    below = np.where(edges > 0, 1 - below, below)
    inner = np.diff(below, axis=1)
    return np.concatenate([inner, 1 - inner.sum(1, keepdims=True)], axis=1)


def _integers(counts: HostArray) -> HostArray:
    """Frequencies, uint16, of rows of counts: at least one, summing up, alike for both signs."""
    both = (counts[:, :-1] + counts[:, -2::-1]) / 2
    both = np.where(LOW_BITS[:, None] == 0, both, counts[:, :-1])  # others round downwards
    counts = np.concatenate([both, counts[:, -1:]], axis=1)
    share = counts / counts.sum(1, keepdims=True)
    frequencies: HostArray = 1 + np.floor(share * (TOTAL - SYMBOLS)).astype(np.int64)
    frequencies[:, LARGEST] += TOTAL - frequencies.sum(1)
    return frequencies.astype(np.uint16)
