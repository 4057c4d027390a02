"""Transform coding by what a calibration trained: known bases, product codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress.arrays import Array, HostArray, Namespace, array_namespace, device, kept
from kvcompress.backend import Dispatcher
from kvcompress.calibration.parameters import LayerParameters, RoleParameters
from kvcompress.errors import SettingError
from kvcompress.methods._gain_shape import Errors, best_gain, inverse, norms
from kvcompress.methods._heads import join_batch, join_heads, split_batch, split_heads
from kvcompress.methods.base import Payload, Role, TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.product import decode_product, encode_product

NORM_STEP = 12 / 254
"""Octaves between the norms that neighbouring bytes stand for: 12 in all, about the mean."""


def encoded_spec(
    parameters: LayerParameters, spec: TensorSpec, role: Role
) -> Mapping[str, TensorSpec]:
    """Arrays of the payload; see `Method.encoded_spec`."""
    heads, tokens, head_dim = spec.shape
    part, known_heads = _part(parameters, role), len(parameters.log_norm)
    units, unit_dim, _ = part.forward.shape
    known_dim = unit_dim * units // known_heads
    if head_dim != known_dim or heads % known_heads:
        raise SettingError(
            f"the calibration knows {known_heads} heads of {known_dim} {role}, "
            f"got {heads} of {head_dim}"
        )
    rows = heads // known_heads * units
    payload = {"codes": TensorSpec((rows, tokens, len(part.codebooks)), "uint8")}
    if role == "values":
        payload["norms"] = TensorSpec((heads, tokens), "uint8")
    return payload


def encode(
    parameters: LayerParameters, x: Array, role: Role, dispatch: Dispatcher
) -> tuple[Payload, Errors]:
    """Payload of a tensor, and what tells its errors: as the attention logits see those of keys."""
    xp, tables = array_namespace(x), _tables(parameters, role, like=x)
    batch, tokens = x.shape[0] // tables.heads, x.shape[1]
    full = dispatch(cast, x, dtype="float32")
    if role == "values":
        scaled, norm, peak = norms(full)
        full = scaled * inverse(norm)
    y = join_batch(join_heads(full, tables.together), tables.units) @ tables.forward
    codes = dispatch(encode_product, y, *tables.codebooks)
    payload = {"codes": split_batch(codes, batch, tokens)}
    if role == "values":
        direction = _directions(tables, payload["codes"], dispatch)
        gain = best_gain(*(xp.vecdot(a, direction)[..., None] for a in (full, direction)))
        payload["norms"] = _norm_bytes((norm * gain * peak)[..., 0], tables.log_norm(x))

    def errors() -> Array:
        error = y - dispatch(decode_product, codes, *tables.codebooks)
        error = xp.clip(error, -(2.0**60), 2.0**60)
        return split_batch(xp.vecdot(error, error)[..., None], batch, tokens)[..., 0]

    return payload, errors


def decode(
    parameters: LayerParameters, payload: Payload, role: Role, dispatch: Dispatcher
) -> Array:
    """Tensor ``[heads, tokens, head_dim]``, float32."""
    tables = _tables(parameters, role, like=payload["codes"])
    x = _directions(tables, payload["codes"], dispatch)
    if role == "keys":
        return x
    x *= _norms(payload["norms"], tables.log_norm(x))[..., None]
    return x


def heads_together(parameters: LayerParameters) -> int:
    """Heads in a unit, of keys and of values alike."""
    return len(parameters.log_norm) // len(parameters.keys.forward)


def _part(parameters: LayerParameters, role: Role) -> RoleParameters:
    return parameters.keys if role == "keys" else parameters.values


def _directions(tables: _Tables, codes: Array, dispatch: Dispatcher) -> Array:
    """Keys, or the directions of values, that codes ``[batch * units, tokens, n]`` stand for."""
    batch, tokens = codes.shape[0] // tables.units, codes.shape[1]
    decoded = dispatch(decode_product, join_batch(codes, tables.units), *tables.codebooks)
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
    units: int

    @property
    def heads(self) -> int:
        return len(self.host_log_norm)

    @property
    def together(self) -> int:
        """Heads in a unit."""
        return self.heads // self.units

    def log_norm(self, like: Array) -> Array:
        """Logarithms of typical norms, ``[batch * heads, 1]``."""
        known = np.tile(self.host_log_norm, like.shape[0] // self.heads)
        return array_namespace(like).asarray(known, device=device(like))[:, None]


@kept(maxsize=1024)
def _tables(parameters: LayerParameters, role: Role, xp: Namespace, where: Any) -> _Tables:
    part = _part(parameters, role)

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    books = tuple(map(move, part.codebooks))
    forward, backward, offset = map(move, (part.forward, part.backward, part.offset))
    return _Tables(forward, books, backward, offset, parameters.log_norm, len(part.forward))
