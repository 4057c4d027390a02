"""Layers of one layer group: exact tokens set aside, the rest coded together; some of it restored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcompress.arrays import Array, HostArray, array_namespace, device, dtype_name, to_host
from kvcompress.compressed.cache import CompressedLayerGroup
from kvcompress.cross_layer import transform as span_transform
from kvcompress.cross_layer.parameters import CrossLayerParameters
from kvcompress.errors import DTypeError, NamespaceError
from kvcompress.ops.casting import cast


def check_alike(arrays: Sequence[Array]) -> None:
    """Raise an error unless keys and values of a layer group are of one library, dtype and device."""
    array_namespace(*arrays)
    dtype, where = dtype_name(arrays[0].dtype), device(arrays[0])
    for x in arrays:
        if dtype_name(x.dtype) != dtype:
            raise DTypeError(
                f"all layers must have one dtype, got {dtype} and {dtype_name(x.dtype)}"
            )
        if device(x) != where:
            raise NamespaceError(f"all layers must be on one device, got {where} and {device(x)}")


def compress_group(
    parameters: CrossLayerParameters,
    keys: Sequence[Array],
    values: Sequence[Array],
    positions: HostArray,
    *,
    sinks: int,
    window: int,
) -> CompressedLayerGroup:
    """Compress layers that hold the same tokens, and that both checks have passed.

    Parameters
    ----------
    parameters : CrossLayerParameters
    keys, values : sequences of arrays ``[batch, num_heads, tokens, head_dim]``
    positions : integer array ``[tokens]``
    sinks, window : int
    """
    like = keys[0]
    xp, where, dtype = array_namespace(like), device(like), dtype_name(like.dtype)
    tokens = like.shape[2]
    sinks = min(sinks, tokens)
    end = max(sinks, tokens - window)
    place = xp.asarray(positions.astype(np.int32), device=where)
    payload = span_transform.encode(
        parameters,
        [k[:, :, sinks:end, :] for k in keys],
        [v[:, :, sinks:end, :] for v in values],
        place[sinks:end],
        seq_len=_length(positions),
    )
    exact = tuple(
        (
            xp.concat([k[:, :, :sinks, :], k[:, :, end:, :]], axis=2),
            xp.concat([v[:, :, :sinks, :], v[:, :, end:, :]], axis=2),
        )
        for k, v in zip(keys, values, strict=True)
    )
    start = int(positions[0]) if tokens else 0
    follow = bool(np.array_equal(positions, start + np.arange(tokens)))
    return CompressedLayerGroup(
        payload,
        exact,
        start if follow else place,
        parameters.fingerprint,
        tuple((tuple(k.shape), tuple(v.shape)) for k, v in zip(keys, values, strict=True)),
        dtype,
        sinks,
    )


def decompress_group(
    part: CompressedLayerGroup,
    parameters: CrossLayerParameters,
    layers: Sequence[int],
    tokens: slice,
) -> list[tuple[Array, Array]]:
    """Keys and values of some layers, counted within the layer group, and some tokens."""
    like = part.exact[0][0]
    xp, where = array_namespace(like), device(like)
    batch, _, count, _ = part.shapes[0][0]
    first, last, _ = tokens.indices(count)
    if not batch:
        shapes = [[(0, s[1], max(0, last - first), s[3]) for s in part.shapes[i]] for i in layers]
        empty = [[xp.zeros(s, dtype=like.dtype, device=where) for s in pair] for pair in shapes]
        return [(k, v) for k, v in empty]
    window = like.shape[2] - part.sinks
    sinks, end = part.sinks, count - window
    low, high = (min(max(i, sinks), end) for i in (first, max(first, last)))
    if isinstance(part.positions, int):
        positions = part.positions + np.arange(count)
    else:
        positions = to_host(part.positions)
    place = xp.asarray(positions[low:high].astype(np.int32), device=where)
    # Cast block by block: all in float32 would take twice the memory of what is returned.
    pieces: list[tuple[list[list[Array]], ...]] = [
        tuple([[] for _ in range(batch)] for _ in range(2)) for _ in layers
    ]
    for b in range(batch):
        rows, at = b * (end - sinks) + np.arange(low, high) - sinks, 0
        for block in span_transform.decode(parameters, part.payload, rows, layers):
            for layer, x, of_layer in zip(layers, block, pieces, strict=True):
                cut = place[at : at + x.shape[0]]
                pair = parameters.group.split(
                    x, cut, batch=1, layer=layer, seq_len=_length(positions)
                )
                for of_role, y in zip(of_layer, pair, strict=True):
                    of_role[b].append(cast(y, dtype=part.dtype))
            at += span_transform.BLOCK
    lead = slice(min(first, sinks), min(last, sinks))
    tail = slice(*(max(i, end) - end + sinks for i in (first, last)))
    result = []
    for layer, of_layer in zip(layers, pieces, strict=True):
        k, v = (
            _joined(x[:, :, lead, :], of_role, x[:, :, tail, :])
            for x, of_role in zip(part.exact[layer], of_layer, strict=True)
        )
        result.append((k, v))
        for of_role in of_layer:
            of_role.clear()
    return result


def _joined(lead: Array, blocks: Sequence[Sequence[Array]], tail: Array) -> Array:
    """Tokens of a layer: exact ones around the blocks decoded of every sequence."""
    xp = array_namespace(lead)
    whole = [
        xp.concat([lead[b : b + 1, ...], *middle, tail[b : b + 1, ...]], axis=2)
        for b, middle in enumerate(blocks)
    ]
    return xp.concat(whole, axis=0) if len(whole) > 1 else whole[0]


def _length(positions: HostArray) -> int:
    return int(positions.max(initial=0)) + 1
