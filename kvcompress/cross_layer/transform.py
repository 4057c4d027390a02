"""The transform across layers: one basis for the keys and values of many, entropy-coded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import numpy as np

from kvcompress.arrays import Array, array_namespace, device, to_host
from kvcompress.backend import Dispatcher
from kvcompress.cross_layer.means import MEAN_FROM, decode_means, encode_means, mean_of
from kvcompress.cross_layer.parameters import CrossLayerParameters
from kvcompress.cross_layer.rows import decode_rows, encode_rows
from kvcompress.cross_layer.tables import backward_tables, forward_tables
from kvcompress.entropy.rans import Decoder
from kvcompress.entropy.streams import LANES, NOTHING, pack, unpack
from kvcompress.errors import SettingError
from kvcompress.files import (
    Facts,
    flatten,
    load_arrays,
    reading,
    require,
    save_arrays,
    unflatten,
)
from kvcompress.methods import CacheMethod
from kvcompress.methods.base import Payload

FORMAT = "kvcompress.cross-layer-transform.2"

BLOCK = 512
"""Rows in work at a time."""


@dataclass(frozen=True)
class CrossLayerTransform(CacheMethod):
    """Code the keys and values of many layers together, in a basis that a calibration trained.

    Keys before RoPE, values over their norms, and the logarithms of these norms, of all layers of a
    layer group and all their heads, are a row of numbers for every token; each counts by what its
    error does to the predictions of the model. The rows, less the mean of the sequence, go to their
    principal components and are rounded to multiples of a step (which is reverse water-filling,
    once entropy-coded) that is finer for tokens likely to be attended to. Tables of integers that
    adapt to every token code the result. Tokens that the basis does not hold well get the residual
    coded as well.

    It sees layers, not a tensor: `KVCacheCompressor.compress_cache` uses it.

    Parameters
    ----------
    groups : tuple of CrossLayerParameters
        One for every group of layers that hold the same tokens, each layer in one of them.

    Raises
    ------
    SettingError
        If there is none, or a layer is in two.
    """

    identifier = "CrossLayerTransform"
    rates = (0.05, 2.0)

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

    @property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        return tuple(known.group.layers for known in self.groups)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return tuple(known.fingerprint for known in self.groups)

    @property
    def nbytes(self) -> int:
        return sum(known.nbytes for known in self.groups)

    @property
    def num_values(self) -> int:
        return sum(known.group.num_values for known in self.groups)

    def check(self, group: int, keys: Sequence[Array], values: Sequence[Array]) -> None:
        self.groups[group].group.check(keys, values)

    def max_nbytes(self, group: int, batch: int, tokens: int) -> int:
        parameters, rows = self.groups[group], batch * tokens
        width = parameters.group.width
        # Every lane ends with two words; a number takes five words at most.
        row = 4 + 2 * (5 + 5 * (parameters.components + width))
        mean = 2 + LANES * (4 + 2 * 4) + 2 * 5 * width
        return rows * row + (batch if tokens >= MEAN_FROM else 0) * mean

    def encode(
        self,
        group: int,
        keys: Sequence[Array],
        values: Sequence[Array],
        positions: Array,
        *,
        seq_len: int,
        dispatch: Dispatcher,
    ) -> Payload:
        like, parameters = keys[0], self.groups[group]
        xp, where = array_namespace(like), device(like)
        batch, tokens, width = like.shape[0], like.shape[2], parameters.group.width
        tables = forward_tables(parameters, like=like)

        def blocks(b: int) -> Iterator[Array]:
            for start in range(0, tokens, BLOCK):
                cut = slice(start, min(start + BLOCK, tokens))
                yield parameters.group.join(
                    [k[b : b + 1, :, cut, :] for k in keys],
                    [v[b : b + 1, :, cut, :] for v in values],
                    positions[cut],
                    seq_len=seq_len,
                )

        means = np.zeros((batch if tokens >= MEAN_FROM else 0, width), np.float32)
        for b, mean in enumerate(means):
            mean[:] = mean_of(tables, blocks(b))
        packed, restored = encode_means(parameters, means, tokens)
        parts = [NOTHING]
        for b in range(batch):
            known = xp.asarray(restored[b], device=where) if len(means) else 0.0
            parts += [encode_rows(tables, rows, known) for rows in blocks(b)]
        words, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        packed |= pack(words, lengths)
        return {name: xp.asarray(x, device=where) for name, x in packed.items()}

    def decode(
        self,
        group: int,
        payload: Payload,
        positions: Array,
        *,
        batch: int,
        tokens: range,
        layers: Sequence[int],
        seq_len: int,
        dispatch: Dispatcher,
    ) -> Iterator[tuple[int, list[tuple[Array, Array]]]]:
        parameters, like = self.groups[group], payload["words"]
        xp, where = array_namespace(like), device(like)
        host = {name: to_host(x) for name, x in payload.items()}
        words, lengths = unpack(host)
        ends = np.cumsum(lengths)
        tables = backward_tables(parameters, like=like)
        means = decode_means(parameters, host) if batch and len(tokens) else np.zeros((0, 0))
        for b in range(batch):
            for start in range(tokens.start, tokens.stop, BLOCK):
                stop = min(start + BLOCK, tokens.stop)
                rows = b * positions.shape[0] + np.arange(start, stop)
                wanted = [words[ends[i] - lengths[i] : ends[i]] for i in rows]
                decoder = Decoder(np.concatenate(wanted), lengths[rows])
                mean = xp.asarray(means[b : b + 1], device=where) if len(means) else 0
                decoded = decode_rows(tables, decoder, mean, len(rows), layers)
                yield (
                    b,
                    [
                        parameters.group.split(
                            x, positions[start:stop], batch=1, layer=layer, seq_len=seq_len
                        )
                        for layer, x in zip(layers, decoded, strict=True)
                    ],
                )

    def save(self, path: str | PathLike[str], /) -> None:
        arrays = {i: known.arrays for i, known in enumerate(self.groups)}
        facts = {"method": self.identifier, "groups": [known.facts for known in self.groups]}
        save_arrays(path, flatten(arrays), form=FORMAT, facts=facts)

    @classmethod
    def load(cls, path: str | PathLike[str], /) -> Self:
        with reading(path, "a CrossLayerTransform"):
            arrays, held = load_arrays(path, form=FORMAT)
            facts = Facts(held, "facts", "method", "groups")
            facts.choice("method", cls.identifier)
            groups, known = facts.objects("groups", "group", "bits"), unflatten(arrays)
            require(
                set(known) == {str(i) for i in range(len(groups))},
                f"there must be arrays of {len(groups)} groups, got {list(known)}",
            )
            parts = (CrossLayerParameters.of(x, known[str(i)]) for i, x in enumerate(groups))
            return cls(tuple(parts))
