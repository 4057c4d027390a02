"""Layers that are coded together: exact tokens set aside, the rest by the method; some restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, device, dtype_name, to_host
from kvcompress.backend import Dispatcher
from kvcompress.compressed.cache import CompressedLayerGroup
from kvcompress.compressor.positions import places_of
from kvcompress.errors import CodingError
from kvcompress.methods.cache_method import CacheMethod
from kvcompress.ops.casting import cast


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a cache are kept exact, and which of the others are asked for.

    Parameters
    ----------
    sinks : int
        Exact tokens at the start.
    end : int
        Number of the first exact token at the end.
    count : int
        Tokens in all.
    asked : slice
        Of all tokens.
    """

    sinks: int
    end: int
    count: int
    asked: slice

    @property
    def coded(self) -> range:
        """Numbers, among those coded, of the tokens asked for."""
        first, last, _ = self.asked.indices(self.count)
        low, high = (min(max(i, self.sinks), self.end) for i in (first, max(first, last)))
        return range(low - self.sinks, high - self.sinks)

    @property
    def lead(self) -> slice:
        """Where, among those exact, the first tokens asked for are."""
        first, last, _ = self.asked.indices(self.count)
        return slice(min(first, self.sinks), min(last, self.sinks))

    @property
    def tail(self) -> slice:
        """Where, among those exact, the last tokens asked for are."""
        first, last, _ = self.asked.indices(self.count)
        start, stop = (max(i, self.end) - self.end + self.sinks for i in (first, last))
        return slice(start, stop)


def compress_group(
    method: CacheMethod,
    group: int,
    pairs: Sequence[tuple[Array, Array]],
    positions: HostArray,
    *,
    sinks: int,
    window: int,
    dispatch: Dispatcher,
) -> CompressedLayerGroup:
    """Compress the layers of a group, which all checks have passed.

    Parameters
    ----------
    method : CacheMethod
    group : int
        Number of the group in `method`.
    pairs : sequence of pairs of arrays ``[batch, num_heads, tokens, head_dim]``
        Keys and values of every layer.
    positions : integer array ``[tokens]``
    sinks, window : int
    dispatch : Dispatcher
    """
    like = pairs[0][0]
    xp, where, count = array_namespace(like), device(like), like.shape[2]
    sinks = min(sinks, count)
    end = max(sinks, count - window)
    place = xp.asarray(positions.astype(np.int32), device=where)
    payload = method.encode(
        group,
        [k[:, :, sinks:end, :] for k, _ in pairs],
        [v[:, :, sinks:end, :] for _, v in pairs],
        place[sinks:end],
        seq_len=_length(positions),
        dispatch=dispatch,
    )

    def exact(x: Array) -> Array:
        return xp.concat([x[:, :, :sinks, :], x[:, :, end:, :]], axis=2)

    places = places_of(positions)
    compressed = CompressedLayerGroup(
        payload=payload,
        exact=tuple((exact(k), exact(v)) for k, v in pairs),
        positions=places if isinstance(places, int) else place,
        method=method.identifier,
        fingerprint=method.fingerprints[group],
        shapes=tuple((tuple(k.shape), tuple(v.shape)) for k, v in pairs),
        dtype=dtype_name(like.dtype),
        sinks=sinks,
    )
    return replace(compressed, checksum=compressed.compute_checksum())


def decompress_group(
    method: CacheMethod,
    part: CompressedLayerGroup,
    layers: Sequence[int],
    asked: slice,
    dispatch: Dispatcher,
) -> list[tuple[Array, Array]]:
    """Restore keys and values of some layers, counted within the group, and some tokens.

    Raises
    ------
    CalibrationError, CodingError
    """
    group, like = method.find(part.fingerprint), part.some_array
    if part.compute_checksum() != part.checksum:
        raise CodingError("the checksum of compressed layers does not match; they are damaged")
    xp, where = array_namespace(like), device(like)
    batch, _, count, _ = part.shapes[0][0]
    tokens = Tokens(part.sinks, count - (like.shape[2] - part.sinks), count, asked)
    if isinstance(part.positions, int):
        positions = part.positions + np.arange(count)
    else:
        positions = to_host(part.positions)
    place = xp.asarray(positions[tokens.sinks : tokens.end].astype(np.int32), device=where)
    # Cast block by block: all in float32 would take twice the memory of what is returned.
    blocks: list[tuple[list[list[Array]], list[list[Array]]]] = [
        ([[] for _ in range(batch)], [[] for _ in range(batch)]) for _ in layers
    ]
    for sequence, pairs in method.decode(
        group,
        part.payload,
        place,
        batch=batch,
        tokens=tokens.coded,
        layers=layers,
        seq_len=_length(positions),
        dispatch=dispatch,
    ):
        for pair, of_layer in zip(pairs, blocks, strict=True):
            for x, of_role in zip(pair, of_layer, strict=True):
                of_role[sequence].append(cast(x, dtype=part.dtype))
    result = []
    for layer, of_layer in zip(layers, blocks, strict=True):
        k, v = (
            _joined(x, tokens, role) for x, role in zip(part.exact[layer], of_layer, strict=True)
        )
        result.append((k, v))
        for of_role in of_layer:
            of_role.clear()
    return result


def _joined(exact: Array, tokens: Tokens, blocks: Iterable[Sequence[Array]]) -> Array:
    """Tokens of a layer: exact ones around the blocks decoded of every sequence."""
    xp, lead, tail = array_namespace(exact), tokens.lead, tokens.tail
    whole = [
        xp.concat([exact[b : b + 1, :, lead, :], *middle, exact[b : b + 1, :, tail, :]], axis=2)
        for b, middle in enumerate(blocks)
    ]
    if not whole:
        _, heads, _, head_dim = exact.shape
        empty = (0, heads, len(range(*tokens.asked.indices(tokens.count))), head_dim)
        return xp.zeros(empty, dtype=exact.dtype, device=device(exact))
    return xp.concat(whole, axis=0) if len(whole) > 1 else whole[0]


def _length(positions: HostArray) -> int:
    return int(positions.max(initial=0)) + 1
