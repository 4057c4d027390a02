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
    astype,
    device,
    is_concrete,
)
from kvcompress.backend import Ops
from kvcompress.errors import SettingError
from kvcompress.layer_code import LayerCode
from kvcompress.layer_statistics import HostArray
from kvcompress.methods._gain_shape import Errors, best_gain, inverse, norms
from kvcompress.methods.base import Payload, Role, TensorSpec
from kvcompress.ops.product import decode_product, encode_product

NORM_STEP = 12 / 254
"""Octaves between the norms that neighbouring bytes stand for: 12 in all, about the mean."""


def encoded_spec(code: LayerCode, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
    """Arrays of the payload; see `Method.encoded_spec`."""
    heads, tokens, head_dim = spec.shape
    part = code.keys if role == "keys" else code.values
    known_heads, known_dim, _ = part.forward.shape
    if head_dim != known_dim or heads % known_heads:
        raise SettingError(
            f"the calibration knows {known_heads} heads of {known_dim} {role}, "
            f"got {heads} of {head_dim}"
        )
    payload = {"codes": TensorSpec((heads, tokens, len(part.codebooks)), "uint8")}
    if role == "values":
        payload["norms"] = TensorSpec((heads, tokens), "uint8")
    return payload


def encode(code: LayerCode, x: Array, role: Role, ops: Ops) -> tuple[Payload, Errors]:
    """Payload of a tensor, and what tells its errors: as the attention logits see those of keys."""
    tables = _tables(code, role, x)
    encode = _encode_keys if role == "keys" else _encode_values
    payload, y = encode(tables, tables.fold(astype(x, "float32")), x, ops)

    def errors() -> Array:
        xp = array_namespace(x)
        error = y - ops(decode_product, tables.fold(payload["codes"]), *tables.codebooks)
        error = xp.clip(error, -(2.0**60), 2.0**60)
        return tables.unfold(xp.vecdot(error, error)[..., None], x)[..., 0]

    return payload, errors


def _encode_keys(tables: _Tables, folded: Array, like: Array, ops: Ops) -> tuple[Payload, Array]:
    y = folded @ tables.forward
    return {"codes": tables.unfold(ops(encode_product, y, *tables.codebooks), like)}, y


def _encode_values(tables: _Tables, folded: Array, like: Array, ops: Ops) -> tuple[Payload, Array]:
    xp = array_namespace(folded)
    scaled, norm, peak = norms(folded)
    y = (scaled @ tables.forward) * inverse(norm)
    codes = ops(encode_product, y, *tables.codebooks)
    # The basis of values is orthonormal and the offset orthogonal to it: all products of the unit
    # value and the decoded direction, decoded @ backward + offset, come from the coefficients.
    decoded, offset = ops(decode_product, codes, *tables.codebooks), tables.offset
    rest = (scaled @ xp.matrix_transpose(offset)) * inverse(norm)
    along = xp.vecdot(y, decoded)[..., None] + rest
    power = xp.vecdot(decoded, decoded)[..., None] + xp.vecdot(offset, offset)[..., None]
    norm = tables.unfold(norm * best_gain(along, power) * peak, like)[..., 0]
    norm_bytes = _norm_bytes(norm, tables.log_norm(like))
    return {"codes": tables.unfold(codes, like), "norms": norm_bytes}, y


def decode(code: LayerCode, payload: Payload, role: Role, ops: Ops) -> Array:
    """Tensor ``[heads, tokens, head_dim]``, float32."""
    codes = payload["codes"]
    tables = _tables(code, role, codes)
    decoded = ops(decode_product, tables.fold(codes), *tables.codebooks)
    x = tables.unfold(decoded @ tables.backward + tables.offset, codes)
    if role == "keys":
        return x
    return x * _norms(payload["norms"], tables.log_norm(codes))[..., None]


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
    heads: int
    host_log_norm: HostArray

    def log_norm(self, like: Array) -> Array:
        """Logarithms of typical norms, ``[batch * heads, 1]``."""
        known = np.tile(self.host_log_norm, like.shape[0] // self.heads)
        return array_namespace(like).asarray(known, device=device(like))[:, None]

    def fold(self, x: Array) -> Array:
        """``[batch * heads, tokens, n]`` to ``[heads, batch * tokens, n]``."""
        xp = array_namespace(x)
        rows, tokens, n = x.shape
        x = xp.reshape(x, (rows // self.heads, self.heads, tokens, n))
        return xp.reshape(
            xp.permute_dims(x, (1, 0, 2, 3)), (self.heads, rows // self.heads * tokens, n)
        )

    def unfold(self, x: Array, like: Array) -> Array:
        """Undo `fold`, for as many rows and tokens as `like` has."""
        xp = array_namespace(x)
        (rows, tokens), n = like.shape[:2], x.shape[-1]
        x = xp.reshape(x, (self.heads, rows // self.heads, tokens, n))
        return xp.reshape(xp.permute_dims(x, (1, 0, 2, 3)), (rows, tokens, n))


def _tables(code: LayerCode, role: Role, like: Array) -> _Tables:
    """Tables in the library and on the device of `like`."""
    # What a compiler traces must not outlive the trace.
    make = _kept_tables if is_concrete(like) else _make_tables
    return make(code, role, array_namespace(like), device(like))


def _make_tables(code: LayerCode, role: Role, xp: Namespace, where: Any) -> _Tables:
    part = code.keys if role == "keys" else code.values

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    books = tuple(map(move, part.codebooks))
    forward, backward, offset = map(move, (part.forward, part.backward, part.offset))
    return _Tables(forward, books, backward, offset, part.forward.shape[0], code.log_norm)


_kept_tables = lru_cache(maxsize=1024)(_make_tables)
