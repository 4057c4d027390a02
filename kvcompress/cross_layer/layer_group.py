"""Layers that are coded together: how the keys and values of a token become one row, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

from kvcompress.arrays import FLOATING, Array, array_namespace, astype, dtype_name
from kvcompress.errors import DTypeError, SettingError, ShapeError, check_integer, normalize
from kvcompress.rope.embedding import RoPE

TINY = 2.0**-16
"""Norms of values are at least this: zero has no logarithm, and must not dominate statistics."""

_LOG_TINY = -16.0
_LN2 = 0.6931471805599453

_LARGEST = 2.0**127
"""Values are restored to at most this, whatever their norms: float32 holds it."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes and rotary embedding of one layer of a `LayerGroup`.

    Parameters
    ----------
    heads, key_dim, value_dim : int
    rope : RoPE, optional
        What the model did to the keys; None if nothing.
    """

    heads: int
    key_dim: int
    value_dim: int
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim"):
            normalize(self, **{name: check_integer(name, getattr(self, name), 1)})
        if self.rope is not None and self.rope.head_dim != self.key_dim:
            raise SettingError(
                f"key_dim is {self.key_dim}, but rope is for head_dim {self.rope.head_dim}"
            )

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Heads and numbers a head, of the three parts of a row.

        Keys, values over their norms, and the logarithms of the norms.
        """
        return tuple((self.heads, dim) for dim in (self.key_dim, self.value_dim, 1))

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(heads * dim for heads, dim in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as values that JSON can carry."""
        rope = None if self.rope is None else self.rope.to_dict()
        return {**asdict(self), "rope": rope}


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a model whose caches hold the same tokens, as rows ``[tokens, width]``.

    The row of a token holds, layer after layer: the keys of all heads, before RoPE; the values of
    all heads over their norms; the binary logarithms of those norms. Errors of the last two are
    relative ones, which is how attention weighs them: tokens with small values draw much of it.

    Parameters
    ----------
    layers : tuple of int
        Indices in the model, rising.
    shapes : tuple of LayerShape
    """

    layers: tuple[int, ...]
    shapes: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.shapes):
            raise SettingError(
                f"expected one shape for every layer, got {len(self.layers)} and {len(self.shapes)}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise SettingError(f"layers must rise, got {list(self.layers)}")

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(shape.width for shape in self.shapes)

    @property
    def num_values(self) -> int:
        """Keys and values of a token."""
        return sum(s.heads * (s.key_dim + s.value_dim) for s in self.shapes)

    @property
    def columns(self) -> tuple[slice, ...]:
        """Where each layer stands in a row."""
        ends = accumulate((shape.width for shape in self.shapes), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    def to_dict(self) -> dict[str, Any]:
        """Return the group as values that JSON can carry; `read_group` undoes it."""
        return {"layers": list(self.layers), "shapes": [shape.to_dict() for shape in self.shapes]}

    def heads(self, rows: Array) -> list[Array]:
        """Rows by layer, group and head: arrays ``[rows, heads, dim]``, of three groups a layer."""
        xp = array_namespace(rows)
        found, at = [], 0
        for heads, dim in (group for shape in self.shapes for group in shape.groups):
            found.append(xp.reshape(rows[:, at : at + heads * dim], (-1, heads, dim)))
            at += heads * dim
        return found

    def check(self, keys: Sequence[Array], values: Sequence[Array]) -> None:
        """Check that keys and values ``[batch, heads, tokens, dim]`` are those of the layers.

        Raises
        ------
        ShapeError, DTypeError
        """
        if len(keys) != len(self.layers) or len(values) != len(self.layers):
            raise ShapeError(
                f"the layer group has {len(self.layers)} layers, got keys of {len(keys)} "
                f"and values of {len(values)}"
            )
        batch, _, tokens, _ = keys[0].shape if keys[0].ndim == 4 else (0, 0, 0, 0)
        for layer, shape, k, v in zip(self.layers, self.shapes, keys, values, strict=True):
            expected = [(batch, shape.heads, tokens, d) for d in (shape.key_dim, shape.value_dim)]
            for name, x, want in zip(("keys", "values"), (k, v), expected, strict=True):
                if tuple(x.shape) != want:
                    raise ShapeError(
                        f"{name} of layer {layer} must be [batch, {shape.heads}, tokens, "
                        f"{want[-1]}], alike in all layers, got shape {tuple(x.shape)}"
                    )
                if dtype_name(x.dtype) not in FLOATING:
                    raise DTypeError(
                        f"{name} of layer {layer} must be one of {', '.join(FLOATING)}, "
                        f"got {dtype_name(x.dtype)}"
                    )

    def join(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        positions: Array,
        *,
        seq_len: int | None = None,
    ) -> Array:
        """Rows of tokens.

        Parameters
        ----------
        keys, values : sequences of arrays ``[batch, heads, tokens, dim]``, one a layer
        positions : integer array ``[tokens]``
        seq_len : int, optional
            See `RoPE.apply`.

        Returns
        -------
        array ``[batch * tokens, width]``, float32
        """
        xp = array_namespace(*keys, *values)
        parts = []
        for shape, k, v in zip(self.shapes, keys, values, strict=True):
            k = astype(k, "float32")
            if shape.rope is not None:
                k = shape.rope.undo(k, positions, seq_len=seq_len)
            parts += [k, *_unit(astype(v, "float32"))]
        return xp.concat([_rows(part) for part in parts], axis=-1)

    def join_gradients(
        self,
        values: Sequence[Array],
        of_keys: Sequence[Array],
        of_values: Sequence[Array],
        positions: Array,
        *,
        seq_len: int | None = None,
    ) -> Array:
        """Gradients by the rows of tokens, from those by keys and values.

        Parameters
        ----------
        values, of_keys, of_values : sequences of arrays ``[batch, heads, tokens, dim]``
            What `join` takes, and the gradients by what it takes.
        positions, seq_len
            As in `join`.

        Returns
        -------
        array ``[batch * tokens, width]``, float32
        """
        xp = array_namespace(*values, *of_keys, *of_values)
        parts = []
        for shape, v, by_k, by_v in zip(self.shapes, values, of_keys, of_values, strict=True):
            by_k, by_v = astype(by_k, "float32"), astype(by_v, "float32")
            if shape.rope is not None:
                # The transpose of a rotation is its inverse; of a multiplication, itself.
                by_k = shape.rope.undo(by_k, positions, seq_len=seq_len) * shape.rope.magnitude**2
            unit, log = _unit(astype(v, "float32"))
            by_v = by_v * xp.exp(_LN2 * log)
            parts += [by_k, by_v, _LN2 * xp.sum(by_v * unit, axis=-1, keepdims=True)]
        return xp.concat([_rows(part) for part in parts], axis=-1)

    def split(
        self,
        rows: Array,
        positions: Array,
        *,
        batch: int,
        layer: int,
        seq_len: int | None = None,
    ) -> tuple[Array, Array]:
        """Keys and values ``[batch, heads, tokens, dim]``, float32, of one layer of the group.

        Parameters
        ----------
        rows : array ``[batch * tokens, width of the layer]``, float32
        positions : integer array ``[tokens]``
        batch : int
        layer : int
            Counted within the layer group.
        seq_len : int, optional
            See `RoPE.apply`.
        """
        shape, tokens = self.shapes[layer], positions.shape[0]
        xp = array_namespace(rows)
        keys, end = shape.heads * shape.key_dim, shape.heads * (shape.key_dim + shape.value_dim)
        k = _heads(rows[:, :keys], batch, tokens, shape.heads)
        v = _heads(rows[:, keys:end], batch, tokens, shape.heads)
        log = _heads(rows[:, end:], batch, tokens, shape.heads)
        if shape.rope is not None:
            k = shape.rope.apply(k, positions, seq_len=seq_len)
        v = v * xp.exp(_LN2 * xp.clip(log, -126.0, 126.0))
        return k, xp.clip(v, -_LARGEST, _LARGEST)


def _unit(v: Array) -> tuple[Array, Array]:
    """Values over their norms, and the binary logarithms of these."""
    xp = array_namespace(v)
    # Squares of the largest magnitudes would overflow.
    peak = xp.clip(xp.max(xp.abs(v), axis=-1, keepdims=True), min=TINY)
    v = v / peak
    norm = xp.clip(xp.sqrt(xp.sum(v * v, axis=-1, keepdims=True)), min=TINY)
    log = xp.clip(xp.log2(norm) + xp.log2(peak), min=_LOG_TINY)
    return v / norm, log


def _rows(x: Array) -> Array:
    """``[batch, heads, tokens, dim]`` to ``[batch * tokens, heads * dim]``."""
    xp = array_namespace(x)
    batch, heads, tokens, dim = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch * tokens, heads * dim))


def _heads(x: Array, batch: int, tokens: int, heads: int) -> Array:
    """Undo `_rows`."""
    xp = array_namespace(x)
    x = xp.reshape(x, (batch, tokens, heads, x.shape[1] // heads))
    return xp.permute_dims(x, (0, 2, 1, 3))
