"""The transform across layers: one basis for the keys and values of many, entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvcompress._namespace import Array, Namespace, array_namespace, astype, device, to_host
from kvcompress.errors import CalibrationError, CodingError, SettingError
from kvcompress.layer_statistics import HostArray
from kvcompress.methods.base import Payload
from kvcompress.spans.code import SpanCode
from kvcompress.spans.coefficient_model import CLASSES, OCTAVE, REACH, classes_of, token_levels
from kvcompress.spans.metric import weigh_layer
from kvcompress.spans.rans import TOTAL, Decoder, Encoder

BLOCK = 256
"""Rows in work at a time."""

MEAN_FROM = 128
"""Tokens of a sequence from which their mean is kept beside them."""

LANES = 32
"""Parts of a row that are coded side by side, where it is coded number by number."""

_PLAIN, _REST, _RAW = range(3)
"""What a token has: coefficients; what they leave, too; or its row as it is, float32."""

_STARTS = np.array([0, TOTAL - 96, TOTAL - 32])
_FREQUENCIES = np.array([TOTAL - 96, 64, 32])

_LARGEST = 2.0**28
"""Rows with numbers beyond this, in steps, are kept as they are."""

_OBLIQUE = 0.005
"""How far whole numbers make the basis from orthonormal, where errors are estimated."""

_NOTHING = np.zeros(0, np.uint16), np.zeros(0, np.int64)
"""Words and lengths of no lanes."""

_CLIPPED = 2.0**50
"""Rows are clipped to this, where only their coefficients are computed from it."""

_FAR = 16.0
"""Power, over the median, of rows that are not like others."""

_LARGEST_MEAN, _LARGEST_SHIFT = 2.0**14, 16
"""Of means in steps, and of the binary logarithms of what they are multiplied by."""


@dataclass(frozen=True)
class SpanTransform:
    """Code the keys and values of many layers together, in a basis that a calibration trained.

    Keys before RoPE, values over their norms, and the logarithms of these norms, of all layers of a
    span and all their heads, are a row of numbers for every token; each counts by what its error
    does to the predictions of the model. They go, less the mean of the sequence, to the principal
    components of such rows, are rounded to multiples of a step (which is reverse water-filling,
    once entropy-coded) that is finer for tokens likely to be attended to, and coded by tables of
    integers that adapt to every token. Tokens that the basis does not hold well get the rest coded
    as well.

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
    words = 5 + (code.components + code.span.width) * 5
    means = rows // MEAN_FROM
    return rows * (4 + 2 * words) + means * (2 + LANES * (4 + 2 * 4) + 2 * code.span.width * 5)


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

    def blocks(b: int) -> Iterator[Array]:
        for start in range(0, tokens, BLOCK):
            cut = slice(start, min(start + BLOCK, tokens))
            yield code.span.join(
                [k[b : b + 1, :, cut, :] for k in keys],
                [v[b : b + 1, :, cut, :] for v in values],
                positions[cut],
                seq_len=seq_len,
            )

    means = np.zeros((batch if tokens >= MEAN_FROM else 0, code.span.width), np.float32)
    for b, mean in enumerate(means):
        mean[:] = _mean(tables, blocks(b))
    packed, restored = _encode_means(code, means, tokens)
    parts = [_NOTHING]
    for b in range(batch):
        mean = xp.asarray(restored[b], device=device(like)) if len(means) else 0.0
        parts += [_encode_rows(tables, rows, mean) for rows in blocks(b)]
    words, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    packed |= _pack(words, lengths)
    return {name: xp.asarray(x, device=device(like)) for name, x in packed.items()}


def decode(
    code: SpanCode, payload: Payload, rows: HostArray, layers: Sequence[int]
) -> Iterator[list[Array]]:
    """Rows of the token numbers `rows`, `BLOCK` at a time: ``[rows, width]`` for each of `layers`.

    Raises
    ------
    CodingError
        If the payload is damaged.
    """
    host = {name: to_host(x) for name, x in payload.items()}
    words, lengths = _unpack(host)
    ends = np.cumsum(lengths)
    like = payload["words"]
    xp, where = array_namespace(like), device(like)
    tables = _backward(code, xp, where)
    means = _decode_means(code, host) if rows.size else np.zeros((0, code.span.width), np.float32)
    for start in range(0, len(rows), BLOCK):
        these = rows[start : start + BLOCK]
        wanted = [words[ends[i] - lengths[i] : ends[i]] for i in these]
        decoder = Decoder(np.concatenate(wanted), lengths[these])
        of_mean = these * len(means) // lengths.size
        mean = xp.asarray(means[of_mean], device=where) if len(means) else 0
        yield _decode_rows(tables, decoder, mean, len(these), layers)


def _pack(words: HostArray, lengths: HostArray, prefix: str = "") -> dict[str, HostArray]:
    """Arrays of a payload that hold the words of lanes, one after the other."""
    width = "<u2" if int(lengths.max(initial=0)) < 1 << 16 else "<u4"
    sizes = lengths.astype(width).view(np.uint8).reshape(len(lengths), np.dtype(width).itemsize)
    return {f"{prefix}lengths": sizes, f"{prefix}words": words.astype("<u2").view(np.uint8)}


def _unpack(host: Mapping[str, HostArray], prefix: str = "") -> tuple[HostArray, HostArray]:
    """Undo `_pack`: words, and how many each lane has."""
    sizes, packed = host[f"{prefix}lengths"], host[f"{prefix}words"]
    width = sizes.shape[-1]
    if width not in (2, 4) or packed.size % 2:
        raise CodingError("lengths and words of a payload have impossible sizes: damaged?")
    lengths = np.ascontiguousarray(sizes).view(f"<u{width}")[:, 0].astype(np.int64)
    words = np.ascontiguousarray(packed).view("<u2")
    if int(lengths.sum()) != words.size:
        raise CodingError(f"lengths of lanes do not sum to the {words.size} words: damaged?")
    return words, lengths


@dataclass(frozen=True, eq=False)
class _Forward:
    """What takes rows to coefficients, on the device, and back to see what is left."""

    mean: Array
    metric: Sequence[Sequence[Array]]
    matrix: Array
    importance: Array
    thresholds: Array
    backward: _Backward


@dataclass(frozen=True, eq=False)
class _Backward:
    """What takes coefficients to rows, on the device."""

    code: SpanCode
    mean: Array
    metric: Sequence[Sequence[Array]]
    matrix: Array
    centres: tuple[Array, Array]


@lru_cache(maxsize=8)
def _backward(code: SpanCode, xp: Namespace, where: Any) -> _Backward:
    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    one, more = (move(centre[code.classes]) for centre in code.centres)
    inverse = [[move(x * code.step) for x in layer] for layer in code.metric.inverse().layers]
    return _Backward(code, move(code.mean), inverse, move(code.backward), (one, more))


@lru_cache(maxsize=8)
def _forward(code: SpanCode, xp: Namespace, where: Any) -> _Forward:
    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    return _Forward(
        move(code.mean),
        [[move(x / code.step) for x in layer] for layer in code.metric.layers],
        move(code.forward),
        move(code.importance),
        move(code.rounding[code.classes]),
        _backward(code, xp, where),
    )


def _weighed(tables: _Forward, rows: Array) -> Array:
    """Rows less the mean of the calibration, weighed, in steps."""
    xp, span = array_namespace(rows), tables.backward.code.span
    parts = [
        weigh_layer(xp.clip(rows[:, c], -_CLIPPED, _CLIPPED) - tables.mean[c], matrices)
        for c, matrices in zip(span.columns, tables.metric, strict=True)
    ]
    return xp.concat(parts, axis=1)


def _mean(tables: _Forward, blocks: Iterator[Array]) -> HostArray:
    """Mean of rows, weighed; but for those far larger than usual among the first: another kind."""
    total, count, most = np.zeros(1), 0, -1.0
    for rows in blocks:
        block, kept, most = _sum(_weighed(tables, rows), most)
        total, count = total + block, count + kept
    mean: HostArray = (total / max(count, 1)).astype(np.float32)
    return mean


def _sum(z: Array, most: float) -> tuple[HostArray, int, float]:
    """Sum of rows of at most so much power, their number, and that power: usual if negative."""
    xp = array_namespace(z)
    power = to_host(xp.vecdot(z, z))
    if most < 0:
        most = _FAR * float(np.median(power))
    keep = power <= most
    if not keep.all():
        z = xp.where(xp.asarray(keep[:, None], device=device(z)), z, 0.0)
    return to_host(xp.sum(z, axis=0)), int(keep.sum()), most


def _encode_means(
    code: SpanCode, means: HostArray, tokens: int
) -> tuple[dict[str, HostArray], HostArray]:
    """Arrays of a payload for means of sequences, in steps, and what they will be restored to.

    Attention averages over tokens: what all have in common is to be known better, by the root of
    their number, than any of them.
    """
    count = len(means)
    if not count:
        return {"means": np.zeros((0, 2), np.uint8), **_pack(*_NOTHING, "mean_")}, means
    shift = round(math.log2(tokens) / 2)
    q = np.rint(np.clip(means, -_LARGEST_MEAN, _LARGEST_MEAN) * np.float32(2.0**shift))
    usual = classes_of(np.sqrt(np.mean(np.square(q, dtype=np.float64), keepdims=True).ravel()))
    lanes = _to_lanes(q)
    coder = Encoder(lanes.shape[1])
    code.model.push(coder, lanes, np.repeat(usual, len(lanes)))
    header = np.asarray([[shift, usual[0]]], np.uint8)
    return {"means": header, **_pack(*coder.finish(), "mean_")}, q * np.float32(2.0**-shift)


def _decode_means(code: SpanCode, host: Mapping[str, HostArray]) -> HostArray:
    """Undo `_encode_means`."""
    width = code.span.width
    words, lengths = _unpack(host, "mean_")
    if len(host["means"]) != bool(lengths.size) or lengths.size % LANES:
        raise CodingError(f"{lengths.size} lanes cannot be those of means: damaged?")
    if not lengths.size:
        return np.zeros((0, width), np.float32)
    shift, usual = host["means"][0].tolist()
    if shift > _LARGEST_SHIFT or usual >= CLASSES:
        raise CodingError(f"means have shift {shift} and class {usual}: damaged?")
    coder = Decoder(words, lengths)
    steps = -(-width // LANES)
    q = code.model.pull(coder, np.full(steps, usual, np.uint8), lengths.size)
    coder.finish()
    means: HostArray = _from_lanes(q, width).astype(np.float32) * np.float32(2.0**-shift)
    return means


def _to_lanes(rows: HostArray) -> HostArray:
    """Whole numbers ``[rows, width]`` as int32 ``[steps, rows * LANES]``."""
    count, width = rows.shape
    padded = np.pad(rows, ((0, 0), (0, -width % LANES)))
    return np.ascontiguousarray(padded.reshape(count * LANES, -1).T, np.int32)


def _from_lanes(lanes: HostArray, width: int) -> HostArray:
    """Undo `_to_lanes`."""
    return np.ascontiguousarray(lanes.T).reshape(-1, len(lanes) * LANES)[:, :width]


def _factors(levels: HostArray) -> HostArray:
    """What coefficients of tokens of these levels are multiplied by, float32 ``[tokens, 1]``."""
    factors: HostArray = np.exp2(levels / OCTAVE).astype(np.float32)[:, None]
    return factors


def _encode_rows(tables: _Forward, rows: Array, mean: Array | float) -> tuple[HostArray, HostArray]:
    """Words of rows, less the mean of their sequence in steps, and how many each has."""
    code = tables.backward.code
    q, levels, mode, tail = _quantize(tables, rows, mean)
    coder = Encoder(len(mode))
    coder.push(_STARTS[mode], _FREQUENCIES[mode])
    coder.push(*(table[levels + REACH] for table in _intervals(code.level_frequencies)))
    code.model.push(coder, q, code.classes, levels)
    return _append(*coder.finish(), tail)


def _quantize(
    tables: _Forward, rows: Array, mean: Array | float
) -> tuple[HostArray, HostArray, HostArray, dict[int, HostArray]]:
    """Coefficients ``[components, rows]``, levels and modes of rows, and words of their rests."""
    xp, back, where = array_namespace(rows), tables.backward, device(rows)
    code = back.code
    z = _weighed(tables, rows) - mean
    huge = ~xp.all(xp.abs(z) < _LARGEST, axis=1)
    if bool(xp.any(huge)):
        z = xp.where(huge[:, None], 0.0, z)
    y = z @ tables.matrix
    levels = token_levels(to_host(y[:, : tables.importance.shape[0]] @ tables.importance))
    factors = xp.asarray(_factors(levels), device=where)
    y = y * factors
    q = _rounded(y, tables.thresholds)
    restored = _magnitudes(q, back.centres)
    whole, power = xp.vecdot(z, z) * factors[:, 0] ** 2, xp.vecdot(y, y)
    y = y - restored
    error = whole - power + xp.vecdot(y, y)
    mode = np.where(to_host(huge), _RAW, _PLAIN)
    near = np.flatnonzero(to_host(error + _OBLIQUE * power) > code.limit[0])
    tail: dict[int, HostArray] = {}
    if near.size:
        index = xp.asarray(near, device=where)
        rest = xp.take(z, index, axis=0) * xp.take(factors, index, axis=0)
        rest = rest - xp.take(restored, index, axis=0) @ back.matrix
        far = np.flatnonzero(to_host(xp.vecdot(rest, rest)) > code.limit[0])
        rest = xp.take(rest, xp.asarray(far, device=where), axis=0)
        words = _rest_words(code, xp.round(rest))
        tail = dict(zip(near[far].tolist(), words, strict=True))
        for row, more in tail.items():
            mode[row] = _RAW if more.size > 2 * code.span.width else _REST
    raw = np.flatnonzero(mode == _RAW)
    host = np.ascontiguousarray(to_host(astype(q, "int32")).T)
    if raw.size:
        host[:, raw] = 0
        kept = to_host(xp.take(rows, xp.asarray(raw, device=where), axis=0))
        tail |= dict(zip(raw.tolist(), kept.astype("<f4").view("<u2"), strict=True))
    return host, levels, mode, tail


def _intervals(frequencies: HostArray) -> tuple[HostArray, HostArray]:
    """Starts and frequencies of symbols."""
    wide = frequencies.astype(np.uint32)
    return np.cumsum(wide, dtype=np.uint32) - wide, wide


def _rest_words(code: SpanCode, rest: Array) -> list[HostArray]:
    """Words of what coefficients leave of rows: lengths of their lanes, and these."""
    count = rest.shape[0]
    if not count:
        return []
    coder = Encoder(count * LANES)
    classes = np.broadcast_to(code.residual_classes, (count, code.span.width))
    code.model.push(coder, _to_lanes(to_host(astype(rest, "int32"))), _to_lanes(classes))
    words, lengths = coder.finish()
    of_rows = lengths.reshape(count, LANES).astype(np.uint16)
    pieces = np.split(words, np.cumsum(of_rows.sum(1, dtype=np.int64))[:-1])
    return [np.concatenate(pair) for pair in zip(of_rows, pieces, strict=True)]


def _pull_rest(code: SpanCode, pieces: Sequence[HostArray]) -> HostArray:
    """Undo `_rest_words`."""
    lengths = np.concatenate([piece[:LANES] for piece in pieces]).astype(np.int64)
    if lengths.size != len(pieces) * LANES:
        raise CodingError("the rest of a row is too short: damaged?")
    classes = np.broadcast_to(code.residual_classes, (len(pieces), code.span.width))
    coder = Decoder(np.concatenate([piece[LANES:] for piece in pieces]), lengths)
    q = code.model.pull(coder, _to_lanes(classes), lengths.size)
    coder.finish()
    return _from_lanes(q, code.span.width)


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
    tables: _Backward, coder: Decoder, mean: Array | int, count: int, layers: Sequence[int]
) -> list[Array]:
    """Rows of the next tokens of a decoder, for each of the layers."""
    code, like = tables.code, tables.matrix
    xp, where, width = array_namespace(like), device(like), tables.code.span.width
    mode = _symbol(coder, _STARTS.astype(np.uint32), _FREQUENCIES.astype(np.uint32))
    levels = _symbol(coder, *_intervals(code.level_frequencies)) - REACH
    q = code.model.pull(coder, code.classes, count, levels)
    special = np.flatnonzero(mode)
    tail = coder.finish(special)
    used = int(np.max(np.flatnonzero(q.any(axis=1)), initial=-1)) + 1
    host = np.ascontiguousarray(q[:used].T).astype(np.float32)
    centres = tables.centres[0][:used], tables.centres[1][:used]
    restored = _magnitudes(xp.asarray(host, device=where), centres)
    restored = restored * xp.asarray(_factors(-levels), device=where)
    more, kept = np.zeros((2, *((count, width) if special.size else (0, 0))), np.float32)
    far = special[mode[special] == _REST]
    if far.size:
        pieces = [words for row, words in zip(special, tail, strict=True) if mode[row] == _REST]
        more[far] = _pull_rest(code, pieces) * _factors(-levels[far])
    for row, words in zip(special, tail, strict=True):
        if mode[row] == _RAW:
            if words.size != 2 * width:
                raise CodingError(f"a row has {words.size} words, not {2 * width}: damaged?")
            kept[row] = np.ascontiguousarray(words).view("<f4")
    parts = []
    for layer in layers:
        cut = code.span.columns[layer]
        z = restored @ tables.matrix[:used, cut] + (mean if isinstance(mean, int) else mean[:, cut])
        if special.size:
            z = z + xp.asarray(more[:, cut], device=where)
        x = weigh_layer(z, tables.metric[layer]) + tables.mean[cut]
        if special.size:
            is_raw = xp.asarray((mode == _RAW)[:, None], device=where)
            x = xp.where(is_raw, xp.asarray(kept[:, cut], device=where), x)
        parts.append(x)
    return parts


def _symbol(coder: Decoder, starts: HostArray, frequencies: HostArray) -> HostArray:
    """Next symbol of every lane."""
    slot = coder.slot()
    symbol = np.searchsorted(starts, slot, side="right") - 1
    coder.take(starts[symbol], frequencies[symbol], slot)
    return symbol


def _rounded(y: Array, thresholds: Array) -> Array:
    """Whole numbers, float32: away from zero from these fractions on."""
    xp = array_namespace(y)
    return xp.sign(y) * xp.floor(xp.abs(y) + (1 - thresholds))


def _magnitudes(q: Array, centres: tuple[Array, Array]) -> Array:
    """Coefficients, in steps, that whole numbers ``[rows, components]``, float32, stand for."""
    xp = array_namespace(q)
    magnitude = xp.abs(q)
    return xp.sign(q) * (magnitude - xp.where(magnitude == 1, *centres))
