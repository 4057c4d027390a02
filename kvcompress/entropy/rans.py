"""Range asymmetric numeral systems: entropy coding of many independent lanes at once; on the host.

Duda 2013, arXiv 1311.2540. In integers alone: the same bytes on every machine. All lanes take the
same steps, so that NumPy does a step of all of them at once, and any of them can be decoded alone.
"""

from __future__ import annotations

import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.errors import CodingError

PRECISION = 15
"""Frequencies of the symbols of a step sum to ``2**PRECISION``."""

TOTAL = 1 << PRECISION

_WORD = 16
_LOW = 1 << 16
"""States between steps are from this to ``2**32 - 1``."""


class Encoder:
    """Encodes steps of all lanes, in the order in which `Decoder` will be asked for them."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._steps: list[tuple[HostArray, HostArray]] = []

    def push(self, start: HostArray, frequency: HostArray) -> None:
        """Add a step: the interval ``[start, start + frequency)`` of `TOTAL` for every lane.

        Parameters
        ----------
        start, frequency : integer arrays ``[lanes]``
            Frequencies are at least 1. All of `TOTAL` costs nothing.
        """
        self._steps.append((start.astype(np.uint16), frequency.astype(np.uint16)))

    def push_bits(self, value: HostArray, bits: HostArray) -> None:
        """Add a step that codes `value`, below ``2**bits``, in as many bits; 0 to `PRECISION`."""
        shift = PRECISION - bits
        self.push(np.left_shift(value, shift), np.left_shift(1, shift))

    def finish(self) -> tuple[HostArray, HostArray]:
        """Return the words, uint16, of one lane after the other, and their number for each."""
        state = np.full(self._lanes, _LOW, dtype=np.uint32)
        emitted: list[tuple[HostArray, HostArray]] = []

        def emit(lanes: HostArray) -> None:
            emitted.append((lanes, (state[lanes] & np.uint32(0xFFFF)).astype(np.uint16)))
            state[lanes] >>= np.uint32(_WORD)

        for start, step in reversed(self._steps):
            frequency = step.astype(np.uint32)
            # The new state must stay below 2**32: state < frequency * 2**(32 - PRECISION).
            full = np.flatnonzero((state >> np.uint32(32 - PRECISION)) >= frequency)
            if full.size:
                emit(full)
            state += state // frequency * (np.uint32(TOTAL) - frequency) + start
        everyone = np.arange(self._lanes)
        emit(everyone)
        emit(everyone)
        lanes, words = (np.concatenate(column) for column in zip(*emitted, strict=True))
        # What was emitted last is read first.
        order = np.argsort(lanes[::-1], kind="stable")
        return words[::-1][order], np.bincount(lanes, minlength=self._lanes)


class Decoder:
    """Decodes what an `Encoder` made, step by step.

    Parameters
    ----------
    words : array, uint16
    lengths : integer array ``[lanes]``
        How many of the words belong to each lane, one after the other.

    Raises
    ------
    CodingError
        If `words` are not as many as `lengths` say.
    """

    def __init__(self, words: HostArray, lengths: HostArray) -> None:
        if int(lengths.sum()) != words.size or int(lengths.min(initial=2)) < 2:
            raise CodingError(
                f"{words.size} words are not those of {lengths.size} tokens; the payload is damaged"
            )
        self._words = np.append(words, np.uint16(0))  # one to look at past the end
        self._end = np.cumsum(lengths)
        self._next = self._end - lengths
        self._state = np.zeros(lengths.size, dtype=np.uint32)
        for _ in range(2):
            self._state = self._state << np.uint32(_WORD) | self._words[self._next]
            self._next += 1

    def slot(self) -> HostArray:
        """Number below `TOTAL`, uint32, in the interval of what every lane holds next."""
        return self._state & np.uint32(TOTAL - 1)

    def take(self, start: HostArray, frequency: HostArray, slot: HostArray) -> None:
        """Go on by the intervals in which `slot` turned out to be; uint32 arrays."""
        state = frequency * (self._state >> np.uint32(PRECISION)) + (slot - start)
        short = state < np.uint32(_LOW)
        more = state << np.uint32(_WORD) | self._words[self._next]
        self._state = np.where(short, more, state)
        # A damaged stream may want more words than there are.
        self._next = np.minimum(self._next + short, self._words.size - 1)

    def bits(self, bits: HostArray) -> HostArray:
        """Undo `Encoder.push_bits`: values, int64."""
        slot = self.slot()
        shift = (PRECISION - bits).astype(np.uint32)
        value = slot >> shift
        self.take(value << shift, np.uint32(1) << shift, slot)
        return value.astype(np.int64)

    def finish(self, lanes: HostArray | None = None) -> list[HostArray]:
        """End here, and return what words are left of `lanes`: others have none.

        Raises
        ------
        CodingError
            If words are left over or missing, or a final state is not the initial one.
        """
        left = self._end - self._next
        wanted = np.zeros(0, np.int64) if lanes is None else lanes
        left_over = [self._words[self._next[i] : self._end[i]] for i in wanted]
        left[wanted] = 0
        if np.any(left) or np.any(self._state != _LOW):
            raise CodingError(
                "the words of a token do not end with the token; the payload is damaged"
            )
        return left_over
