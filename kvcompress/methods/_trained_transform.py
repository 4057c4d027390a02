"""Transform coding by what a calibration trained: known bases, product codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvcompress._namespace import (
    Array,
    Namespace,
    array_namespace,
    device,
    is_concrete,
)
from kvcompress.backend import Ops
from kvcompress.errors import SettingError
from kvcompress.layer_code import LayerCode, RoleCode
from kvcompress.layer_statistics import HostArray
from kvcompress.methods._gain_shape import Errors, best_gain, inverse, norms
from kvcompress.methods._spans import join_batch, join_heads, split_batch, split_heads
from kvcompress.methods.base import Payload, Role, TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.product import decode_product, encode_product

NORM_STEP = 12 / 254
"""Octaves between the norms that neighbouring bytes stand for: 12 in all, about the mean."""


def encoded_spec(code: LayerCode, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
    """Arrays of the payload; see `Method.encoded_spec`."""
    heads, tokens, head_dim = spec.shape
    part, known_heads = _part(code, role), len(code.log_norm)
    spans, span_dim, _ = part.forward.shape
    known_dim = span_dim * spans // known_heads
    if head_dim != known_dim or heads % known_heads:
        raise SettingError(
            f"the calibration knows {known_heads} heads of {known_dim} {role}, "
            f"got {heads} of {head_dim}"
        )
    rows = heads // known_heads * spans
    payload = {"codes": TensorSpec((rows, tokens, len(part.codebooks)), "uint8")}
    if role == "values":
        payload["norms"] = TensorSpec((heads, tokens), "uint8")
    return payload


def encode(code: LayerCode, x: Array, role: Role, ops: Ops) -> tuple[Payload, Errors]:
    """Payload of a tensor, and what tells its errors: as the attention logits see those of keys."""
    xp, tables = array_namespace(x), _tables(code, role, x)
    batch, tokens = x.shape[0] // tables.heads, x.shape[1]
    full = ops(cast, x, dtype="float32")
    if role == "values":
        scaled, norm, peak = norms(full)
        full = scaled * inverse(norm)
    y = join_batch(join_heads(full, tables.together), tables.spans) @ tables.forward
    codes = ops(encode_product, y, *tables.codebooks)
    payload = {"codes": split_batch(codes, batch, tokens)}
    if role == "values":
        direction = _directions(tables, payload["codes"], ops)
        gain = best_gain(*(xp.vecdot(a, direction)[..., None] for a in (full, direction)))
        payload["norms"] = _norm_bytes((norm * gain * peak)[..., 0], tables.log_norm(x))

    def errors() -> Array:
        error = y - ops(decode_product, codes, *tables.codebooks)
        error = xp.clip(error, -(2.0**60), 2.0**60)
        return split_batch(xp.vecdot(error, error)[..., None], batch, tokens)[..., 0]

    return payload, errors


def decode(code: LayerCode, payload: Payload, role: Role, ops: Ops) -> Array:
    """Tensor ``[heads, tokens, head_dim]``, float32."""
    tables = _tables(code, role, payload["codes"])
    x = _directions(tables, payload["codes"], ops)
    if role == "keys":
        return x
    x *= _norms(payload["norms"], tables.log_norm(x))[..., None]
    return x


def heads_together(code: LayerCode) -> int:
    """Heads in a span, of keys and of values alike."""
    return len(code.log_norm) // len(code.keys.forward)


def _part(code: LayerCode, role: Role) -> RoleCode:
    return code.keys if role == "keys" else code.values


def _directions(tables: _Tables, codes: Array, ops: Ops) -> Array:
    """Keys, or the directions of values, that codes ``[batch * spans, tokens, n]`` stand for."""
    batch, tokens = codes.shape[0] // tables.spans, codes.shape[1]
    decoded = ops(decode_product, join_batch(codes, tables.spans), *tables.codebooks)
    x = decoded @ tables.backward
    x += tables.offset
    return split_heads(split_batch(x, batch, tokens), tables.together)


def _norm_bytes(norm: Array, log_norm: Array) -> Array:
    """Bytes for norms ``[heads, tokens]``: 0 for zero, else 1 to 255 by the logarithm."""
    xp = array_namespace(norm)
    octave = xp.log2(xp.where(norm > 0, norm, 1.0)) - log_norm
    byte = xp.clip(xp.round(octave / NORM_STEP) + 128.0, 1.0, 255.0)
    return xp.astype(xp.where(norm > 0, byte, 0.0), xp.uint8)


def _norms(byte: Array, log_norm: Array) -> Array:
    xp = array_namespace(byte)
    octave = (xp.astype(byte, xp.float32) - 128.0) * NORM_STEP + log_norm
    return xp.where(byte > 0, xp.exp(octave * math.log(2.0)), 0.0)


@dataclass(frozen=True)
class _Tables:
    """The code of a role, as arrays of one library on one device."""

    forward: Array
    codebooks: tuple[Array, ...]
    backward: Array
    offset: Array
    host_log_norm: HostArray
    spans: int

    @property
    def heads(self) -> int:
        return len(self.host_log_norm)

    @property
    def together(self) -> int:
        """Heads in a span."""
        return self.heads // self.spans

    def log_norm(self, like: Array) -> Array:
        """Logarithms of typical norms, ``[batch * heads, 1]``."""
        known = np.tile(self.host_log_norm, like.shape[0] // self.heads)
        return array_namespace(like).asarray(known, device=device(like))[:, None]


def _tables(code: LayerCode, role: Role, like: Array) -> _Tables:
    """Tables in the library and on the device of `like`."""
    # What a compiler traces must not outlive the trace.
    make = _kept_tables if is_concrete(like) else _make_tables
    return make(code, role, array_namespace(like), device(like))


def _make_tables(code: LayerCode, role: Role, xp: Namespace, where: Any) -> _Tables:
    part = _part(code, role)

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    books = tuple(map(move, part.codebooks))
    forward, backward, offset = map(move, (part.forward, part.backward, part.offset))
    return _Tables(forward, books, backward, offset, code.log_norm, len(part.forward))


_kept_tables = lru_cache(maxsize=1024)(_make_tables)
