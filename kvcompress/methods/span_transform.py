"""The transform across layers: one basis for the keys and values of many, entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvcompress._namespace import Array, Namespace, array_namespace, astype, device, to_host
from kvcompress.errors import CalibrationError, CodingError, SettingError
from kvcompress.layer_statistics import HostArray
from kvcompress.methods.base import Payload
from kvcompress.spans.code import REST_STEPS, SpanCode
from kvcompress.spans.rans import TOTAL, Decoder, Encoder

BLOCK = 256
"""Rows in work at a time."""

_PLAIN, _REST, _RAW = range(3)
"""What a token has: coefficients; what they leave, too; or its row as it is, float32."""

_STARTS = np.array([0, TOTAL - 96, TOTAL - 32])
_FREQUENCIES = np.array([TOTAL - 96, 64, 32])

_LARGEST = 2.0**28
"""Rows with numbers beyond this, in steps, are kept as they are."""

_OBLIQUE = 0.005
"""How far whole numbers make the basis from orthonormal, where errors are estimated."""

_CLIPPED = 2.0**50
"""Rows are clipped to this, where only their coefficients are computed from it."""


@dataclass(frozen=True)
class SpanTransform:
    """Code the keys and values of many layers together, in a basis that a calibration trained.

    Keys before RoPE, values over their norms, and the logarithms of these norms, of all layers of a
    span and all their heads, are a row of numbers for every token; each counts by what its error
    does to attention. They go to the principal components of such rows, are rounded to multiples of
    one step (which is reverse water-filling, once entropy-coded), and coded by tables of integers
    that adapt to every token. Tokens that the basis does not hold well get the rest coded as well.

    Not a `Method`: it sees layers, not a tensor, and `KVCacheCompressor.compress_cache` alone can
    use it. Runs eagerly: the size of what it makes follows from the data.

    Parameters
    ----------
    codes : tuple of SpanCode
        One for every group of layers that hold the same tokens, each layer in one of them.

    Raises
    ------
    SettingError
        If there is none, or a layer is in two.
    """

    codes: tuple[SpanCode, ...]

    def __post_init__(self) -> None:
        codes: Any = self.codes
        if isinstance(codes, SpanCode):
            codes = (codes,)
        codes = tuple(codes)
        if not codes or not all(isinstance(code, SpanCode) for code in codes):
            raise SettingError(f"codes must be a SpanCode or several, got {self.codes!r}")
        layers = [layer for code in codes for layer in code.span.layers]
        if len(set(layers)) < len(layers):
            raise SettingError(f"a layer may be in one span only, got {sorted(layers)}")
        object.__setattr__(self, "codes", codes)

    def find(self, fingerprint: str) -> SpanCode:
        """The code with a fingerprint.

        Raises
        ------
        CalibrationError
            If it is not among `codes`.
        """
        for code in self.codes:
            if code.fingerprint == fingerprint:
                return code
        known = ", ".join(code.fingerprint[:12] for code in self.codes)
        raise CalibrationError(
            f"this was compressed with the span code {fingerprint[:12]}, not with {known}"
        )


def largest_nbytes(code: SpanCode, rows: int) -> int:
    """Bytes that `encode` makes of so many rows at most: a bound, which is never nearly met."""
    words = 4 + (code.components + code.span.width) * 5
    return rows * (4 + 2 * words)


def encode(
    code: SpanCode,
    keys: Sequence[Array],
    values: Sequence[Array],
    positions: Array,
    *,
    seq_len: int,
) -> Payload:
    """Payload of layers ``[batch, heads, tokens, dim]``; see `Span.join`."""
    like = keys[0]
    xp, batch, tokens = array_namespace(like), like.shape[0], like.shape[2]
    tables = _forward(code, xp, device(like))
    words: list[HostArray] = [np.zeros(0, np.uint16)]
    lengths: list[HostArray] = [np.zeros(0, np.int64)]
    for b in range(batch):
        for start in range(0, tokens, BLOCK):
            cut = slice(start, min(start + BLOCK, tokens))
            rows = code.span.join(
                [k[b : b + 1, :, cut, :] for k in keys],
                [v[b : b + 1, :, cut, :] for v in values],
                positions[cut],
                seq_len=seq_len,
            )
            for parts, part in zip((words, lengths), _encode_rows(tables, rows), strict=True):
                parts.append(part)
    length = np.concatenate(lengths)
    width = "<u2" if int(length.max(initial=0)) < 1 << 16 else "<u4"
    packed = np.concatenate(words).astype("<u2").view(np.uint8)
    sizes = length.astype(width).view(np.uint8).reshape(len(length), np.dtype(width).itemsize)
    return {
        name: xp.asarray(x, device=device(like))
        for name, x in (("lengths", sizes), ("words", packed))
    }


def decode(code: SpanCode, payload: Payload, rows: HostArray, layers: Sequence[int]) -> list[Array]:
    """Rows of the token numbers `rows`, ``[rows, width of the layer]``, of layers of the span.

    Raises
    ------
    CodingError
        If the payload is damaged.
    """
    sizes, packed = to_host(payload["lengths"]), to_host(payload["words"])
    width = sizes.shape[-1]
    if width not in (2, 4) or packed.size % 2:
        raise CodingError("lengths and words of a payload have impossible sizes: damaged?")
    lengths = np.ascontiguousarray(sizes).view(f"<u{width}")[:, 0].astype(np.int64)
    words = np.ascontiguousarray(packed).view("<u2")
    ends = np.cumsum(lengths)
    if (int(ends[-1]) if ends.size else 0) != words.size:
        raise CodingError(f"lengths of tokens do not sum to the {words.size} words: damaged?")
    like = payload["words"]
    tables = _backward(code, array_namespace(like), device(like))
    columns = [code.span.columns[layer] for layer in layers]
    blocks: list[list[Array]] = [[] for _ in layers]
    for start in range(0, len(rows), BLOCK):
        these = rows[start : start + BLOCK]
        wanted = [words[ends[i] - lengths[i] : ends[i]] for i in these]
        decoder = Decoder(np.concatenate(wanted), lengths[these])
        restored = _decode_rows(tables, decoder, len(these), columns)
        for block, part in zip(blocks, restored, strict=True):
            block.append(part)
    xp = array_namespace(like)
    return [
        xp.concat(block)
        if block
        else xp.zeros((0, c.stop - c.start), dtype=xp.float32, device=device(like))
        for block, c in zip(blocks, columns, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Forward:
    """What takes rows to coefficients, on the device, and back to see what is left."""

    code: SpanCode
    mean: Array
    scale: Array
    matrix: Array
    thresholds: Array
    backward: _Backward


@dataclass(frozen=True, eq=False)
class _Backward:
    """What takes coefficients to rows, on the device."""

    code: SpanCode
    mean: Array
    step: Array
    matrix: Array
    centres: tuple[Array, Array]


@lru_cache(maxsize=8)
def _backward(code: SpanCode, xp: Namespace, where: Any) -> _Backward:
    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    one, more = (move(centre[code.classes]) for centre in code.centres)
    return _Backward(code, move(code.mean), move(1 / code.scale), move(code.backward), (one, more))


@lru_cache(maxsize=8)
def _forward(code: SpanCode, xp: Namespace, where: Any) -> _Forward:
    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    return _Forward(
        code,
        move(code.mean),
        move(code.scale),
        move(code.forward),
        move(code.rounding[code.classes]),
        _backward(code, xp, where),
    )


def _encode_rows(tables: _Forward, rows: Array) -> tuple[HostArray, HostArray]:
    """Words of rows, and how many each has."""
    xp, code, back = array_namespace(rows), tables.code, tables.backward
    z = (xp.clip(rows, -_CLIPPED, _CLIPPED) - tables.mean) * tables.scale
    huge = ~xp.all(xp.abs(z) < _LARGEST, axis=1)
    z = xp.where(huge[:, None], 0.0, z)
    y = z @ tables.matrix
    magnitude = xp.floor(xp.abs(y) + (1 - tables.thresholds))
    q = xp.where(y < 0, -magnitude, magnitude)
    restored = _magnitudes(q, back.centres)
    missed, power = y - restored, xp.vecdot(y, y)
    error = xp.vecdot(z, z) - power + xp.vecdot(missed, missed)
    mode = np.where(to_host(huge), _RAW, _PLAIN)
    near = np.flatnonzero(to_host(error + _OBLIQUE * power) > code.limit[0])
    tail: dict[int, HostArray] = {}
    if near.size:
        index = xp.asarray(near, device=device(rows))
        rest = xp.take(z, index, axis=0) - xp.take(restored, index, axis=0) @ back.matrix
        far = np.flatnonzero(to_host(xp.vecdot(rest, rest)) > code.limit[0])
        rest = xp.take(rest, xp.asarray(far, device=device(rows)), axis=0)
        words = _rest_words(code, xp.round(rest * REST_STEPS))
        tail = dict(zip(near[far].tolist(), words, strict=True))
        for row, more in tail.items():
            mode[row] = _RAW if more.size > 2 * code.span.width else _REST
    raw = np.flatnonzero(mode == _RAW)
    host = np.ascontiguousarray(to_host(astype(q, "int32")).T)
    if raw.size:
        host[:, raw] = 0
        kept = to_host(xp.take(rows, xp.asarray(raw, device=device(rows)), axis=0))
        tail |= dict(zip(raw.tolist(), kept.astype("<f4").view("<u2"), strict=True))
    coder = Encoder(len(mode))
    coder.push(_STARTS[mode], _FREQUENCIES[mode])
    code.model.push(coder, host, code.classes)
    return _append(*coder.finish(), tail)


def _rest_words(code: SpanCode, rest: Array) -> list[HostArray]:
    """Words of what coefficients leave of rows."""
    if not rest.shape[0]:
        return []
    q = np.ascontiguousarray(to_host(astype(rest, "int32")).T)
    coder = Encoder(q.shape[1])
    code.model.push(coder, q, code.residual_classes)
    words, lengths = coder.finish()
    return np.split(words, np.cumsum(lengths)[:-1])


def _append(
    words: HostArray, lengths: HostArray, tail: Mapping[int, HostArray]
) -> tuple[HostArray, HostArray]:
    """Put more words behind those of some lanes."""
    if not tail:
        return words, lengths
    pieces = np.split(words, np.cumsum(lengths)[:-1])
    for lane, more in tail.items():
        pieces[lane] = np.concatenate([pieces[lane], more])
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces])


def _decode_rows(
    tables: _Backward, coder: Decoder, count: int, columns: Sequence[slice]
) -> list[Array]:
    """Rows of the next tokens of a decoder, for each of the columns."""
    code, like = tables.code, tables.matrix
    xp, where, width = array_namespace(like), device(like), tables.code.span.width
    slot = coder.slot()
    mode = np.searchsorted(_STARTS, slot, side="right") - 1
    coder.take(_STARTS[mode].astype(np.uint32), _FREQUENCIES[mode].astype(np.uint32), slot)
    q = code.model.pull(coder, code.classes, count)
    special = np.flatnonzero(mode)
    tail = coder.finish(special)
    used = int(np.max(np.flatnonzero(q.any(axis=1)), initial=-1)) + 1
    host = np.ascontiguousarray(q[:used].T).astype(np.float32)
    centres = tables.centres[0][:used], tables.centres[1][:used]
    restored = _magnitudes(xp.asarray(host, device=where), centres)
    more, kept = np.zeros((2, *((count, width) if special.size else (0, 0))), np.float32)
    far = special[mode[special] == _REST]
    if far.size:
        pieces = [words for row, words in zip(special, tail, strict=True) if mode[row] == _REST]
        rest = Decoder(np.concatenate(pieces), np.array([len(piece) for piece in pieces]))
        more[far] = code.model.pull(rest, code.residual_classes, far.size).T / REST_STEPS
        rest.finish()
    for row, words in zip(special, tail, strict=True):
        if mode[row] == _RAW:
            if words.size != 2 * width:
                raise CodingError(f"a row has {words.size} words, not {2 * width}: damaged?")
            kept[row] = np.ascontiguousarray(words).view("<f4")
    parts = []
    for cut in columns:
        z = restored @ tables.matrix[:used, cut]
        if special.size:
            z = z + xp.asarray(more[:, cut], device=where)
        x = z * tables.step[cut] + tables.mean[cut]
        if special.size:
            is_raw = xp.asarray((mode == _RAW)[:, None], device=where)
            x = xp.where(is_raw, xp.asarray(kept[:, cut], device=where), x)
        parts.append(x)
    return parts


def _magnitudes(q: Array, centres: tuple[Array, Array]) -> Array:
    """Coefficients, in steps, that whole numbers ``[rows, components]``, float32, stand for."""
    xp = array_namespace(q)
    one, more = centres
    magnitude = xp.abs(q)
    magnitude = magnitude - xp.where(magnitude == 1, one, xp.where(magnitude > 1, more, 0.0 * more))
    return xp.where(q < 0, -magnitude, magnitude)
