"""Rows of tokens as words: levels, coefficients, and residuals where these are large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, astype, device, to_host
from kvcompress.cross_layer.metric import weigh_layer
from kvcompress.cross_layer.parameters import CrossLayerParameters
from kvcompress.cross_layer.tables import Backward, Forward, weighed
from kvcompress.entropy.context_model import OCTAVE, REACH, token_levels
from kvcompress.entropy.rans import TOTAL, Decoder, Encoder
from kvcompress.entropy.streams import LANES, from_lanes, to_lanes
from kvcompress.errors import CodingError

_PLAIN, _RESIDUAL, _RAW = range(3)
"""What a token has: coefficients; residuals, too; or its row as it is, float32."""

_STARTS = np.array([0, TOTAL - 96, TOTAL - 32])

_FREQUENCIES = np.array([TOTAL - 96, 64, 32])

_LARGEST = 2.0**28
"""Rows with numbers beyond this, in steps, are kept as they are."""

_WHOLE = 2.0**30
"""So are rows with coefficients or residuals from this: whole numbers are int32."""

_OBLIQUE = 0.005
"""How far whole numbers make the basis from orthonormal, where errors are estimated."""


def encode_rows(tables: Forward, rows: Array, mean: Array | float) -> tuple[HostArray, HostArray]:
    """Words of rows, less the mean of their sequence in steps, and how many each has."""
    parameters = tables.backward.parameters
    q, levels, mode, tail = _quantize(tables, rows, mean)
    coder = Encoder(len(mode))
    coder.push(_STARTS[mode], _FREQUENCIES[mode])
    coder.push(*(table[levels + REACH] for table in _intervals(parameters.level_frequencies)))
    parameters.model.push(coder, q, parameters.classes, levels)
    return _append(*coder.finish(), tail)


def _quantize(
    tables: Forward, rows: Array, mean: Array | float
) -> tuple[HostArray, HostArray, HostArray, dict[int, HostArray]]:
    """Coefficients ``[components, rows]``, levels and modes of rows, and words of residuals."""
    xp, back, where = array_namespace(rows), tables.backward, device(rows)
    parameters = back.parameters
    z = weighed(tables, rows) - mean
    huge = ~xp.all(xp.abs(z) < _LARGEST, axis=1)
    if bool(xp.any(huge)):
        z = xp.where(huge[:, None], 0.0, z)
    y = z @ tables.matrix
    levels = token_levels(to_host(y[:, : tables.importance.shape[0]] @ tables.importance))
    factors = xp.asarray(_factors(levels), device=where)
    y = y * factors
    q = _rounded(y, tables.thresholds)
    large = ~xp.all(xp.abs(q) < _WHOLE, axis=1)
    if bool(xp.any(large)):
        huge = huge | large
        z, y, q = (xp.where(huge[:, None], 0.0, x) for x in (z, y, q))
    restored = _magnitudes(q, back.centres)
    whole, power = xp.vecdot(z, z) * factors[:, 0] ** 2, xp.vecdot(y, y)
    y = y - restored
    error = whole - power + xp.vecdot(y, y)
    mode = np.where(to_host(huge), _RAW, _PLAIN)
    near = np.flatnonzero(to_host(error + _OBLIQUE * power) > parameters.limit[0])
    tail: dict[int, HostArray] = {}
    if near.size:
        index = xp.asarray(near, device=where)
        residual = xp.take(z, index, axis=0) * xp.take(factors, index, axis=0)
        residual = residual - xp.take(restored, index, axis=0) @ back.matrix
        far = np.flatnonzero(to_host(xp.vecdot(residual, residual)) > parameters.limit[0])
        residual = xp.round(xp.take(residual, xp.asarray(far, device=where), axis=0))
        fits = to_host(xp.all(xp.abs(residual) < _WHOLE, axis=1))
        if not fits.all():
            mode[near[far[~fits]]] = _RAW
            residual = xp.take(residual, xp.asarray(np.flatnonzero(fits), device=where), axis=0)
            far = far[fits]
        words = _residual_words(parameters, residual)
        tail = dict(zip(near[far].tolist(), words, strict=True))
        for row, more in tail.items():
            mode[row] = _RAW if more.size > 2 * parameters.group.width else _RESIDUAL
    raw = np.flatnonzero(mode == _RAW)
    host = np.ascontiguousarray(to_host(astype(q, "int32")).T)
    if raw.size:
        host[:, raw] = 0
        kept = to_host(xp.take(rows, xp.asarray(raw, device=where), axis=0))
        tail |= dict(zip(raw.tolist(), kept.astype("<f4").view("<u2"), strict=True))
    return host, levels, mode, tail


def _residual_words(parameters: CrossLayerParameters, residual: Array) -> list[HostArray]:
    """Words of residuals of rows: lengths of their lanes, then the words of these."""
    count = residual.shape[0]
    if not count:
        return []
    coder = Encoder(count * LANES)
    classes = np.broadcast_to(parameters.residual_classes, (count, parameters.group.width))
    parameters.model.push(coder, to_lanes(to_host(astype(residual, "int32"))), to_lanes(classes))
    words, lengths = coder.finish()
    of_rows = lengths.reshape(count, LANES).astype(np.uint16)
    pieces = np.split(words, np.cumsum(of_rows.sum(1, dtype=np.int64))[:-1])
    return [np.concatenate(pair) for pair in zip(of_rows, pieces, strict=True)]


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


def decode_rows(
    tables: Backward, coder: Decoder, mean: Array | int, count: int, layers: Sequence[int]
) -> list[Array]:
    """Rows of the next tokens of a decoder, for each of the layers."""
    parameters, like = tables.parameters, tables.matrix
    xp, where, width = array_namespace(like), device(like), tables.parameters.group.width
    mode = _symbol(coder, _STARTS.astype(np.uint32), _FREQUENCIES.astype(np.uint32))
    levels = _symbol(coder, *_intervals(parameters.level_frequencies)) - REACH
    q = parameters.model.pull(coder, parameters.classes, count, levels)
    special = np.flatnonzero(mode)
    tail = coder.finish(special)
    used = int(np.max(np.flatnonzero(q.any(axis=1)), initial=-1)) + 1
    host = np.ascontiguousarray(q[:used].T).astype(np.float32)
    centres = tables.centres[0][:used], tables.centres[1][:used]
    restored = _magnitudes(xp.asarray(host, device=where), centres)
    restored = restored * xp.asarray(_factors(-levels), device=where)
    more, kept = np.zeros((2, *((count, width) if special.size else (0, 0))), np.float32)
    far = special[mode[special] == _RESIDUAL]
    if far.size:
        pieces = [words for row, words in zip(special, tail, strict=True) if mode[row] == _RESIDUAL]
        more[far] = _pull_residual(parameters, pieces) * _factors(-levels[far])
    for row, words in zip(special, tail, strict=True):
        if mode[row] == _RAW:
            if words.size != 2 * width:
                raise CodingError(
                    f"a row has {words.size} words, not {2 * width}; the payload is damaged"
                )
            kept[row] = np.ascontiguousarray(words).view("<f4")
    parts = []
    for layer in layers:
        cut = parameters.group.columns[layer]
        z = restored @ tables.matrix[:used, cut] + (mean if isinstance(mean, int) else mean[:, cut])
        if special.size:
            z = z + xp.asarray(more[:, cut], device=where)
        x = weigh_layer(z, tables.metric[layer]) + tables.mean[cut]
        if special.size:
            is_raw = xp.asarray((mode == _RAW)[:, None], device=where)
            x = xp.where(is_raw, xp.asarray(kept[:, cut], device=where), x)
        parts.append(x)
    return parts


def _pull_residual(parameters: CrossLayerParameters, pieces: Sequence[HostArray]) -> HostArray:
    """Undo `_residual_words`."""
    lengths = np.concatenate([piece[:LANES] for piece in pieces]).astype(np.int64)
    if lengths.size != len(pieces) * LANES:
        raise CodingError("the residual of a row is too short; the payload is damaged")
    classes = np.broadcast_to(parameters.residual_classes, (len(pieces), parameters.group.width))
    coder = Decoder(np.concatenate([piece[LANES:] for piece in pieces]), lengths)
    q = parameters.model.pull(coder, to_lanes(classes), lengths.size)
    coder.finish()
    return from_lanes(q, parameters.group.width)


def _symbol(coder: Decoder, starts: HostArray, frequencies: HostArray) -> HostArray:
    """Next symbol of every lane."""
    slot = coder.slot()
    symbol = np.searchsorted(starts, slot, side="right") - 1
    coder.take(starts[symbol], frequencies[symbol], slot)
    return symbol


def _intervals(frequencies: HostArray) -> tuple[HostArray, HostArray]:
    """Starts and frequencies of symbols."""
    wide = frequencies.astype(np.uint32)
    return np.cumsum(wide, dtype=np.uint32) - wide, wide


def _factors(levels: HostArray) -> HostArray:
    """What coefficients of tokens of these levels are multiplied by, float32 ``[tokens, 1]``."""
    factors: HostArray = np.exp2(levels / OCTAVE).astype(np.float32)[:, None]
    return factors


def _rounded(y: Array, thresholds: Array) -> Array:
    """Whole numbers, float32: away from zero from these fractions on."""
    xp = array_namespace(y)
    return xp.sign(y) * xp.floor(xp.abs(y) + (1 - thresholds))


def _magnitudes(q: Array, centres: tuple[Array, Array]) -> Array:
    """Coefficients, in steps, that whole numbers ``[rows, components]``, float32, stand for."""
    xp = array_namespace(q)
    magnitude = xp.abs(q)
    return xp.sign(q) * (magnitude - xp.where(magnitude == 1, *centres))
