"""The transform across layers: one basis for the keys and values of many, entropy-coded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, device, to_host
from kvcompress.cross_layer.means import MEAN_FROM, decode_means, encode_means, mean_of
from kvcompress.cross_layer.parameters import CrossLayerParameters
from kvcompress.cross_layer.rows import decode_rows, encode_rows
from kvcompress.cross_layer.tables import backward_tables, forward_tables
from kvcompress.entropy.rans import Decoder
from kvcompress.entropy.streams import LANES, NOTHING, pack, unpack
from kvcompress.errors import CalibrationError, SettingError
from kvcompress.methods.base import Payload

BLOCK = 512
"""Rows in work at a time."""


@dataclass(frozen=True)
class CrossLayerTransform:
    """Code the keys and values of many layers together, in a basis that a calibration trained.

    Keys before RoPE, values over their norms, and the logarithms of these norms, of all layers of a
    layer group and all their heads, are a row of numbers for every token; each counts by what its
    error does to the predictions of the model. They go, less the mean of the sequence, to the
    principal components of such rows, are rounded to multiples of a step (which is reverse
    water-filling, once entropy-coded) that is finer for tokens likely to be attended to, and coded
    by tables of integers that adapt to every token. Tokens that the basis does not hold well get
    the rest coded as well.

    Not a `Method`: it sees layers, not a tensor, and `KVCacheCompressor.compress_cache` alone can
    use it. Runs eagerly: the size of what it makes follows from the data.

    Parameters
    ----------
    groups : tuple of CrossLayerParameters
        One for every group of layers that hold the same tokens, each layer in one of them.

    Raises
    ------
    SettingError
        If there is none, or a layer is in two.
    """

    groups: tuple[CrossLayerParameters, ...]

    def __post_init__(self) -> None:
        groups: Any = self.groups
        if isinstance(groups, CrossLayerParameters):
            groups = (groups,)
        groups = tuple(groups)
        if not groups or not all(isinstance(known, CrossLayerParameters) for known in groups):
            raise SettingError(
                f"groups must be one CrossLayerParameters or several, got {self.groups!r}"
            )
        layers = [layer for known in groups for layer in known.group.layers]
        if len(set(layers)) < len(layers):
            raise SettingError(f"a layer may be in one layer group only, got {sorted(layers)}")
        object.__setattr__(self, "groups", groups)

    def find(self, fingerprint: str) -> CrossLayerParameters:
        """Return the parameters with a fingerprint.

        Raises
        ------
        CalibrationError
            If they are not among `groups`.
        """
        for known in self.groups:
            if known.fingerprint == fingerprint:
                return known
        names = ", ".join(known.fingerprint[:12] for known in self.groups)
        raise CalibrationError(
            f"this was compressed with the parameters {fingerprint[:12]}, not with {names}"
        )


def largest_nbytes(parameters: CrossLayerParameters, rows: int) -> int:
    """Bytes that `encode` makes of so many rows at most: a bound, which is never nearly met."""
    words = 5 + (parameters.components + parameters.group.width) * 5
    means = rows // MEAN_FROM
    return rows * (4 + 2 * words) + means * (
        2 + LANES * (4 + 2 * 4) + 2 * parameters.group.width * 5
    )


def encode(
    parameters: CrossLayerParameters,
    keys: Sequence[Array],
    values: Sequence[Array],
    positions: Array,
    *,
    seq_len: int,
) -> Payload:
    """Payload of layers ``[batch, heads, tokens, dim]``; see `Span.join`."""
    like = keys[0]
    xp, batch, tokens = array_namespace(like), like.shape[0], like.shape[2]
    tables = forward_tables(parameters, xp, device(like))

    def blocks(b: int) -> Iterator[Array]:
        for start in range(0, tokens, BLOCK):
            cut = slice(start, min(start + BLOCK, tokens))
            yield parameters.group.join(
                [k[b : b + 1, :, cut, :] for k in keys],
                [v[b : b + 1, :, cut, :] for v in values],
                positions[cut],
                seq_len=seq_len,
            )

    means = np.zeros((batch if tokens >= MEAN_FROM else 0, parameters.group.width), np.float32)
    for b, mean in enumerate(means):
        mean[:] = mean_of(tables, blocks(b))
    packed, restored = encode_means(parameters, means, tokens)
    parts = [NOTHING]
    for b in range(batch):
        mean = xp.asarray(restored[b], device=device(like)) if len(means) else 0.0
        parts += [encode_rows(tables, rows, mean) for rows in blocks(b)]
    words, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    packed |= pack(words, lengths)
    return {name: xp.asarray(x, device=device(like)) for name, x in packed.items()}


def decode(
    parameters: CrossLayerParameters, payload: Payload, rows: HostArray, layers: Sequence[int]
) -> Iterator[list[Array]]:
    """Rows of the token numbers `rows`, `BLOCK` at a time: ``[rows, width]`` for each of `layers`.

    Raises
    ------
    CodingError
        If the payload is damaged.
    """
    host = {name: to_host(x) for name, x in payload.items()}
    words, lengths = unpack(host)
    ends = np.cumsum(lengths)
    like = payload["words"]
    xp, where = array_namespace(like), device(like)
    tables = backward_tables(parameters, xp, where)
    means = (
        decode_means(parameters, host)
        if rows.size
        else np.zeros((0, parameters.group.width), np.float32)
    )
    for start in range(0, len(rows), BLOCK):
        these = rows[start : start + BLOCK]
        wanted = [words[ends[i] - lengths[i] : ends[i]] for i in these]
        decoder = Decoder(np.concatenate(wanted), lengths[these])
        of_mean = these * len(means) // lengths.size
        mean = xp.asarray(means[of_mean], device=where) if len(means) else 0
        yield decode_rows(tables, decoder, mean, len(these), layers)
