"""`Calibration`: statistics of a model's keys, values and queries, gathered as they stream by."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from kvcompress.arrays import (
    FLOAT16_MAX,
    FLOATING,
    Array,
    HostArray,
    array_namespace,
    check_array,
    digest,
    dtype_name,
    to_host,
)
from kvcompress.calibration.format import check_sums
from kvcompress.calibration.ropes import (
    check_rope,
    read_rope,
    rope_array,
    ropes_to_dict,
)
from kvcompress.calibration.statistics import LayerStatistics
from kvcompress.errors import (
    CalibrationError,
    DTypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnknownLayer,
    check_integer,
)
from kvcompress.files import (
    Facts,
    flatten,
    load_arrays,
    reading,
    require,
    save_arrays,
    unflatten,
)
from kvcompress.files.facts import layer_number, shown
from kvcompress.rope import RoPE

FORMAT = "kvcompress.calibration.4"

_TINY = 1e-30


class Calibration:
    """Streaming statistics per layer and head: second moments, and rows drawn at random.

    Feed it the keys, values and queries of texts like those to come; what it holds grows with the
    model, not with the texts. Sums are float64, on the host.

    Parameters
    ----------
    rows : int
        Tokens per layer whose keys and values are kept to train codebooks on.
    skip : int
        First tokens of every sequence left out: attention sinks have statistics of their own, and
        are better kept exact.
    seed : int
        Of the choice of rows. Calibrations to be merged need different seeds.

    Attributes
    ----------
    provenance : dict
        What the tokens are from, whatever JSON can hold: saved, but no part of the fingerprint.
    """

    def __init__(self, *, rows: int = 8192, skip: int = 4, seed: int = 0) -> None:
        check_integer("rows", rows, 256)
        check_integer("skip", skip, 0)
        check_integer("seed", seed, 0)
        self.rows = rows
        self.skip = skip
        self.seed = seed
        self.provenance: dict[str, Any] = {}
        self._layers: dict[int, dict[str, HostArray]] = {}
        self._ropes: dict[int, RoPE] = {}

    def __repr__(self) -> str:
        return f"Calibration({len(self._layers)} layers, {self.tokens:,} tokens)"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have statistics."""
        return tuple(sorted(self._layers))

    @property
    def tokens(self) -> int:
        """Tokens gathered in the layer that has the fewest; 0 without layers."""
        return min((int(sums["tokens"]) for sums in self._layers.values()), default=0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all statistics, in hexadecimal."""
        ropes = {layer: rope_array(rope) for layer, rope in self._ropes.items()}
        return digest({**flatten(self._layers), **flatten(ropes)})

    def update(
        self,
        layer: int,
        k: Array,
        v: Array,
        q: Array | None = None,
        /,
        *,
        rope: RoPE | None = None,
        positions: Array | None = None,
    ) -> None:
        """Add the tokens of whole sequences to the statistics of a layer, or change nothing.

        Parameters
        ----------
        layer : int
        k, v : arrays ``[batch, num_heads, seq_len, head_dim]``, or without the batch
            As the cache holds them: keys after RoPE.
        q : array ``[batch, num_query_heads, seq_len, head_dim]``, or without the batch, optional
            As attention uses them: after RoPE. Query head ``h`` reads KV head
            ``h // (num_query_heads // num_heads)``.
        rope : RoPE, optional
            What rotated keys and queries: statistics are of what they were before, and so hold for
            all positions. Without it they hold for the positions of `k` and `q` only, unless the
            layer has no RoPE.
        positions : integer array ``[seq_len]``, optional
            Where the tokens stand, with `rope`; from 0 on if left out.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError, NonFiniteError, SettingError
        CalibrationError
            If the layer has statistics with another RoPE.
        """
        check_integer("layer", layer, 0)
        keys, values = _host("k", k), _host("v", v)
        queries = keys[:, :, :0] if q is None else _host("q", q)
        self._check(layer, keys, values, queries)
        if layer in self._layers:
            check_rope(layer, self._ropes.get(layer), rope)
        if rope is not None:
            keys, queries = _before_rope(rope, positions, keys, queries)
            self._ropes[layer] = rope
        self._add(layer, keys, values, queries)

    def _add(self, layer: int, keys: HostArray, values: HostArray, queries: HostArray) -> None:
        """Add what has been checked."""
        batch, heads = keys.shape[:2]
        # The queries of a group read the same keys: as if they were more tokens.
        queries = _tokens(queries.reshape(batch, heads, -1 if queries.size else 0, keys.shape[-1]))
        keys, values = (_tokens(x[:, :, self.skip :]) for x in (keys, values))
        norms = np.linalg.norm(values, axis=-1, keepdims=True)
        unit = np.where(norms > _TINY, values / np.maximum(norms, _TINY), 0.0)
        logs = np.log2(np.maximum(norms[..., 0], _TINY))
        logs = np.where(norms[..., 0] > _TINY, logs, 0.0)
        tokens = keys.shape[1]
        new = {
            "tokens": np.asarray(float(tokens)),
            "nonzero": np.sum(norms[..., 0] > _TINY, axis=-1).astype(np.float64),
            "queries": np.asarray(float(queries.shape[1])),
            "key_sum": keys.sum(1),
            "key_moment": _moment(keys),
            "value_sum": unit.sum(1),
            "value_moment": _moment(unit),
            "log_norm_sum": logs.sum(1),
            "query_moment": np.swapaxes(queries, 1, 2) @ queries,
            "tags": np.random.default_rng((self.seed, layer, self._seen(layer))).random(tokens),
            "key_rows": np.clip(keys, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16),
            "value_rows": unit.astype(np.float16),
        }
        self._layers[layer] = _merge(self._layers.get(layer), new, self.rows)

    def merge(self, other: Calibration, /) -> Calibration:
        """Return the calibration on the tokens of both.

        Raises
        ------
        CalibrationError
            If a layer of both has other shapes or another RoPE, or the rows were drawn with the
            same seed.
        """
        if self.seed == other.seed and self._layers and other._layers:
            raise CalibrationError(
                f"calibrations to merge need different seeds, both have {self.seed}"
            )
        merged = Calibration(
            rows=min(self.rows, other.rows), skip=max(self.skip, other.skip), seed=self.seed
        )
        for layer in {**self._layers, **other._layers}:
            held = [c for c in (self, other) if layer in c._layers]
            parts = [c._layers[layer] for c in held]
            check_rope(layer, held[0]._ropes.get(layer), held[-1]._ropes.get(layer))
            if any(p["key_rows"].shape[::2] != parts[0]["key_rows"].shape[::2] for p in parts):
                raise CalibrationError(f"layer {layer} has other heads or another head_dim")
            sums = _merge(None, parts[0], merged.rows)
            for part in parts[1:]:
                sums = _merge(sums, part, merged.rows)
            merged._layers[layer] = sums
            if layer in held[0]._ropes:
                merged._ropes[layer] = held[0]._ropes[layer]
        return merged

    def __getitem__(self, layer: int) -> LayerStatistics:
        """Statistics of one layer.

        Raises
        ------
        UnknownLayer
            If nothing was gathered for it.
        CalibrationError
            If fewer tokens were gathered than a codebook has centroids.
        """
        if layer not in self._layers:
            raise UnknownLayer(
                f"layer {layer!r} has no statistics; there are {sorted(self._layers)}"
            )
        sums = self._layers[layer]
        tokens, nonzero = float(sums["tokens"]), np.maximum(sums["nonzero"], 1.0)
        if tokens < 256:
            raise CalibrationError(f"layer {layer} saw {tokens:.0f} tokens; 256 are the least")
        every = np.full_like(nonzero, tokens)
        key_mean, key_covariance = _moments(sums["key_sum"], sums["key_moment"], every)
        value_mean, value_covariance = _moments(sums["value_sum"], sums["value_moment"], nonzero)
        heads, head_dim = key_mean.shape
        queries = float(sums["queries"])
        moment = sums["query_moment"] / queries if queries else np.eye(head_dim)
        return LayerStatistics(
            key_mean=key_mean,
            key_covariance=key_covariance,
            query_moment=np.broadcast_to(moment, (heads, head_dim, head_dim)).copy(),
            value_mean=value_mean,
            value_covariance=value_covariance,
            value_log_norm=sums["log_norm_sum"] / nonzero,
            key_rows=sums["key_rows"],
            value_rows=sums["value_rows"],
            rope=self._ropes.get(layer),
        )

    def save(self, path: str | PathLike[str], /) -> None:
        """Write a safetensors file, wholly or not at all.

        Raises
        ------
        FileError
            If it cannot be written.
        CalibrationError
            If JSON cannot hold the provenance.
        """
        settings = {"rows": self.rows, "skip": self.skip, "seed": self.seed}
        ropes = ropes_to_dict(self._ropes)
        facts = {"settings": settings, "provenance": self.provenance, "ropes": ropes}
        save_arrays(path, flatten(self._layers), form=FORMAT, facts=facts)

    @classmethod
    def load(cls, path: str | PathLike[str], /) -> Calibration:
        """Read a file that `save` wrote.

        Raises
        ------
        FileError
            If there is no such file, or it cannot be read.
        CalibrationError
            If it is not such a file, or damaged.
        """
        with reading(path, "a calibration"):
            arrays, held = load_arrays(path, form=FORMAT)
            facts = Facts(held, "facts", "settings", "provenance", "ropes")
            calibration = cls(**facts.object("settings", "rows", "skip", "seed").plain)
            calibration.provenance = facts.object("provenance").plain
            ropes = facts.object("ropes")
            for name, sums in unflatten(arrays).items():
                layer = layer_number(name)
                check_sums(sums, calibration.rows, f"{name}.")
                calibration._layers[layer] = sums
                rope = read_rope(ropes, name, sums["key_sum"].shape[-1])
                if rope is not None:
                    calibration._ropes[layer] = rope
            require(
                set(ropes.plain) == {str(layer) for layer in calibration._ropes},
                f"ropes must be of layers that have statistics, got {shown(list(ropes.plain))}",
            )
        return calibration

    def _seen(self, layer: int) -> int:
        return int(self._layers[layer]["tokens"]) if layer in self._layers else 0

    def _check(self, layer: int, k: HostArray, v: HostArray, q: HostArray) -> None:
        if k.shape[:-1] != v.shape[:-1]:
            raise ShapeError(
                f"k and v must agree in all sizes but the last, got {k.shape}, {v.shape}"
            )
        if q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
            raise ShapeError(
                f"q must have the batch and head_dim of k and a multiple of its heads, "
                f"got q {q.shape}, k {k.shape}"
            )
        if layer in self._layers:
            known = self._layers[layer]
            heads, _, key_dim = known["key_rows"].shape
            expected = (heads, key_dim, known["value_rows"].shape[-1])
            found = (k.shape[1], k.shape[3], v.shape[3])
            if expected != found:
                raise ShapeError(
                    f"layer {layer} has heads, head_dim of keys and values {expected}, got {found}"
                )


def _host(name: str, x: Array) -> HostArray:
    array_namespace(x)
    check_array(name, x)
    if dtype_name(x.dtype) not in FLOATING:
        raise DTypeError(f"{name} must be one of {', '.join(FLOATING)}, got {dtype_name(x.dtype)}")
    if x.ndim not in (3, 4):
        raise ShapeError(f"{name} must be [batch, heads, seq_len, head_dim], got {tuple(x.shape)}")
    host = to_host(x).astype(np.float64)
    if not np.all(np.isfinite(host)):
        raise NonFiniteError(f"{name} holds values that are not finite")
    return host if host.ndim == 4 else host[None]


def _tokens(x: HostArray) -> HostArray:
    """``[batch, heads, seq_len, dim]`` to ``[heads, batch * seq_len, dim]``."""
    batch, heads, length, dim = x.shape
    return x.transpose(1, 0, 2, 3).reshape(heads, batch * length, dim)


def _before_rope(
    rope: RoPE, positions: Array | None, keys: HostArray, queries: HostArray
) -> tuple[HostArray, HostArray]:
    """Undo a RoPE of keys and queries of the same tokens.

    Raises
    ------
    SettingError, DTypeError, ShapeError
    """
    if not isinstance(rope, RoPE):
        raise SettingError(f"rope must be a RoPE or None, got {rope!r}")
    if rope.head_dim != keys.shape[-1]:
        raise ShapeError(f"rope is for head_dim {rope.head_dim}, but keys have {keys.shape[-1]}")
    count = keys.shape[2]
    places = np.arange(count) if positions is None else to_host(positions)
    if places.shape != (count,) or (queries.size and queries.shape[2] != count):
        raise ShapeError(
            f"with a rope, k, q and positions must have the same tokens, got {count}, "
            f"{queries.shape[2]} and {places.shape}"
        )
    seq_len = int(np.max(places, initial=0)) + 1

    def undone(x: HostArray) -> HostArray:
        if not x.size:
            return x
        full: HostArray = rope.undo(x.astype(np.float32), places, seq_len=seq_len)
        return full.astype(np.float64)

    return undone(keys), undone(queries)


def _merge(
    old: dict[str, HostArray] | None, new: dict[str, HostArray], rows: int
) -> dict[str, HostArray]:
    """Add sums, and keep the rows with the smallest tags of both."""
    if old is not None:
        joined = {"tags": 0, "key_rows": 1, "value_rows": 1}
        new = {
            name: np.concatenate([old[name], x], axis=joined[name])
            if name in joined
            else old[name] + x
            for name, x in new.items()
        }
    if new["tags"].shape[0] > rows:
        keep = np.sort(np.argpartition(new["tags"], rows)[:rows])
        new = {
            **new,
            "tags": new["tags"][keep],
            "key_rows": new["key_rows"][:, keep],
            "value_rows": new["value_rows"][:, keep],
        }
    return new


def _moment(x: HostArray) -> HostArray:
    """Sum of the outer products of tokens, all heads side by side, of ``[heads, tokens, dim]``."""
    flat = np.swapaxes(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])
    moment: HostArray = flat.T @ flat
    return moment


def _moments(total: HostArray, moment: HostArray, count: HostArray) -> tuple[HostArray, HostArray]:
    """Mean ``[heads, dim]`` and covariance of all heads side by side, from sums."""
    mean = total / count[:, None]
    weight = np.repeat(np.sqrt(count), mean.shape[1])
    flat = mean.ravel()
    return mean, moment / weight[:, None] / weight - flat[:, None] * flat
