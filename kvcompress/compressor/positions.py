"""Rotary embeddings undone of the keys that a method codes, and done again of what it restores."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from kvcompress.arrays import (
    Array,
    HostArray,
    array_namespace,
    device,
    dtype_name,
    is_concrete,
    to_host,
)
from kvcompress.backend import Dispatcher
from kvcompress.compressed.kv import Positions
from kvcompress.compressor.validation import FARTHEST, check_token_positions
from kvcompress.errors import NamespaceError, PayloadError, SettingError, check_integer
from kvcompress.methods.base import TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.rope import RoPE

Places: TypeAlias = int | Array
"""Position of the first token, where the others follow one another, or of every token."""


def check_places(positions: Any, like: Array) -> Places:
    """Return positions of the tokens of `like` as given to `compress_kv`, 0 for none.

    Raises
    ------
    SettingError, DTypeError, ShapeError
        If they are neither an integer nor an array of integers, one for every token, or out of
        range.
    NamespaceError
        If they are of another library than `like`, NumPy aside, or on another device.
    """
    if positions is None:
        return 0
    if not hasattr(positions, "dtype") or isinstance(positions, np.generic):
        return check_integer("positions", positions, 0, FARTHEST)
    check_token_positions(positions, (), (like.shape[-2],))
    if isinstance(positions, np.ndarray):
        return positions if positions.shape else int(positions)
    array_namespace(positions, like)
    if device(positions) != device(like):
        raise NamespaceError(
            f"positions must be on {device(like)}, as keys and values, got {device(positions)}"
        )
    return positions


def places_of(positions: HostArray) -> Places:
    """Return the first of positions that follow one another, else all of them."""
    first = int(positions[0]) if len(positions) else 0
    follow = np.array_equal(positions, first + np.arange(len(positions)))
    return first if follow else positions


def locate(places: Places, like: Array, *, coded: slice, tokens: int, rope: RoPE) -> Positions:
    """Return the positions of the coded ones of `tokens`, on the device of `like`.

    Raises
    ------
    SettingError
        If the RoPE depends on the length of the sequence, which a compiler traces.
    """
    xp, where = array_namespace(like), device(like)
    seq_len = _seq_len(places, tokens) if rope.depends_on_length else None
    if isinstance(places, int) or not places.shape:
        first = places + coded.start
        if isinstance(first, int):
            return Positions(xp.asarray([first], dtype=xp.int32, device=where), seq_len)
        return Positions(xp.reshape(xp.astype(first, xp.int32), (1,)), seq_len)
    if isinstance(places, np.ndarray):
        places = xp.asarray(places.astype(np.int32), device=where)
    return Positions(xp.astype(places[coded], xp.int32), seq_len)


def check_positions(positions: Positions | None, tokens: int, rope: RoPE | None) -> None:
    """Check that there are positions of `tokens` if there is a RoPE, and none otherwise.

    Raises
    ------
    PayloadError
    """
    if rope is None or positions is None:
        if (rope is None) != (positions is None):
            raise PayloadError("keys have positions if, and only if, they are coded before RoPE")
        return
    count = positions.places.shape[0] if positions.places.ndim else 0
    if count not in (1, tokens):
        raise PayloadError(f"positions must be of 1 token or of {tokens}, got {count}")
    TensorSpec((count,), "int32").check("positions", positions.places)
    if rope.depends_on_length and positions.seq_len is None:
        raise PayloadError(f"positions must tell seq_len for {rope.scaling}")


def without_rope(x: Array, rope: RoPE, positions: Positions, dispatch: Dispatcher) -> Array:
    """Undo a RoPE of keys ``[heads, tokens, head_dim]``; of their dtype."""
    full = dispatch(cast, x, dtype="float32")
    full = rope.undo(full, _every(positions, x), seq_len=positions.seq_len)
    return dispatch(cast, full, dtype=dtype_name(x.dtype))


def with_rope(x: Array, rope: RoPE, positions: Positions, dispatch: Dispatcher) -> Array:
    """Undo `without_rope`; float32."""
    full = dispatch(cast, x, dtype="float32")
    return rope.apply(full, _every(positions, x), seq_len=positions.seq_len)


def _every(positions: Positions, x: Array) -> Array:
    """Position of every token."""
    xp, tokens, places = array_namespace(x), x.shape[1], positions.places
    if places.shape[0] == tokens:
        return places
    return places + xp.arange(tokens, dtype=xp.int32, device=device(x))


def _seq_len(places: Places, tokens: int) -> int:
    if isinstance(places, int):
        return max(1, places + tokens)
    if not is_concrete(places):
        raise SettingError(
            "with this scaling of RoPE, frequencies depend on the length of the sequence: give "
            "positions that a compiler does not trace"
        )
    host = to_host(places)
    return int(host) + tokens if not host.shape else int(np.max(host, initial=0)) + 1
