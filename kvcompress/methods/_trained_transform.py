"""Transform coding by what a calibration trained: known bases, product codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress.arrays import (
    Array,
    HostArray,
    Namespace,
    array_namespace,
    astype,
    device,
    kept,
)
from kvcompress.backend import Dispatcher
from kvcompress.calibration.format import reach
from kvcompress.calibration.parameters import LayerParameters, RoleParameters
from kvcompress.errors import SettingError
from kvcompress.methods._gain_shape import Errors, best_gain, inverse, norms
from kvcompress.methods._heads import join_batch, join_heads, split_batch, split_heads
from kvcompress.methods._norm_bytes import LARGEST, USUAL, norm_bytes, octaves, power_of_two
from kvcompress.methods.base import Payload, Role, TensorSpec
from kvcompress.ops.casting import cast
from kvcompress.ops.product import decode_product, encode_product


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
    payload["norms"] = TensorSpec((heads, tokens), "uint8")
    return payload


def encode(
    parameters: LayerParameters, x: Array, role: Role, dispatch: Dispatcher
) -> tuple[Payload, Errors]:
    """Payload of a tensor, and what tells its errors: as the attention logits see those of keys."""
    xp, tables = array_namespace(x), _tables(parameters, role, like=x)
    batch, tokens = x.shape[0] // tables.heads, x.shape[1]
    full = dispatch(cast, x, dtype="float32")
    scaled, norm, peak = norms(full)
    if role == "keys":
        byte = _key_bytes(tables, norm[..., 0], peak[..., 0])
        gain = _key_gains(tables, byte)
        full = full * inverse(gain)[..., None]
    else:
        full = scaled * inverse(norm)
    y = join_batch(join_heads(full, tables.together), tables.units) @ tables.forward
    codes = dispatch(encode_product, y, *tables.codebooks)
    payload = {"codes": split_batch(codes, batch, tokens)}
    if role == "values":
        byte = _value_bytes(tables, full, payload["codes"], norm, peak, dispatch)
    payload["norms"] = xp.astype(byte, xp.uint8)

    def errors() -> Array:
        error = y - dispatch(decode_product, codes, *tables.codebooks)
        error = split_batch(error, batch, tokens)
        if role == "keys":
            # Of a unit, the head of the largest gain errs most, and is what must be kept.
            heads = xp.reshape(gain, (error.shape[0], tables.together, tokens))
            error = error * xp.max(heads, axis=1)[..., None]
        error = xp.clip(error, -(2.0**60), 2.0**60)
        return xp.vecdot(error, error)

    return payload, errors


def decode(
    parameters: LayerParameters, payload: Payload, role: Role, dispatch: Dispatcher
) -> Array:
    """Tensor ``[heads, tokens, head_dim]``, float32."""
    tables = _tables(parameters, role, like=payload["codes"])
    x = _directions(tables, payload["codes"], dispatch)
    byte = astype(payload["norms"], "float32")
    gain = _key_gains(tables, byte) if role == "keys" else _norms(tables, byte)
    x *= gain[..., None]
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


def _key_bytes(tables: _Tables, norm: Array, peak: Array) -> Array:
    """Bytes, float32, of the norms of keys over `peak`: as usual in the range of the codebooks."""
    xp = array_namespace(norm)
    usual, low, high = tables.of_heads(tables.host_key_norms, norm)
    log_norm = xp.log2(xp.where(norm > 0, norm, 1.0)) + xp.log2(peak)
    within = (log_norm >= low) & (log_norm <= high)
    byte = xp.where(within, float(USUAL), norm_bytes(log_norm, usual))
    return xp.where(norm > 0, byte, 0.0)


def _key_gains(tables: _Tables, byte: Array) -> Array:
    """What the keys that were coded are multiplied by."""
    xp = array_namespace(byte)
    return xp.where(byte > 0, power_of_two(octaves(byte), tables.most), 0.0)


def _value_bytes(
    tables: _Tables, unit: Array, codes: Array, norm: Array, peak: Array, dispatch: Dispatcher
) -> Array:
    """Bytes, float32, of the norms that bring the directions of values closest."""
    xp, direction = array_namespace(unit), _directions(tables, codes, dispatch)
    gain = best_gain(*(xp.vecdot(a, direction)[..., None] for a in (unit, direction)))
    norm = (norm * gain)[..., 0]
    (usual,) = tables.of_heads(tables.host_log_norm[:, None], norm)
    log_norm = xp.log2(xp.where(norm > 0, norm, 1.0)) + xp.log2(peak[..., 0])
    return xp.where(norm > 0, norm_bytes(log_norm, usual), 0.0)


def _norms(tables: _Tables, byte: Array) -> Array:
    """Norms of values."""
    xp = array_namespace(byte)
    (usual,) = tables.of_heads(tables.host_log_norm[:, None], byte)
    return xp.where(byte > 0, power_of_two(octaves(byte) + usual, tables.most), 0.0)


@dataclass(frozen=True)
class _Tables:
    """The code of a role, as arrays of one library on one device."""

    forward: Array
    codebooks: tuple[Array, ...]
    backward: Array
    offset: Array
    host_log_norm: HostArray
    host_key_norms: HostArray
    units: int
    most: float
    """Largest binary logarithm of a norm by which what is decoded stays finite, rotated too."""

    @property
    def heads(self) -> int:
        return len(self.host_log_norm)

    @property
    def together(self) -> int:
        """Heads in a unit."""
        return self.heads // self.units

    def of_heads(self, known: HostArray, like: Array) -> tuple[Array, ...]:
        """Columns of ``known [heads, columns]``, each ``[batch * heads, 1]`` and beside `like`."""
        xp, batch = array_namespace(like), like.shape[0] // self.heads
        return tuple(
            xp.asarray(np.tile(column, batch), device=device(like))[:, None] for column in known.T
        )


@kept(maxsize=1024)
def _tables(parameters: LayerParameters, role: Role, xp: Namespace, where: Any) -> _Tables:
    part = _part(parameters, role)

    def move(x: HostArray) -> Array:
        return xp.asarray(x, device=where)

    books = tuple(map(move, part.codebooks))
    forward, backward, offset = map(move, (part.forward, part.backward, part.offset))
    norms_known = parameters.log_norm, parameters.key_norms
    largest = reach(part.codebooks, part.backward, part.offset)
    if role == "keys" and parameters.rope is not None:
        largest *= parameters.rope.magnitude
    most = LARGEST - math.log2(max(1.0, largest))
    return _Tables(forward, books, backward, offset, *norms_known, len(part.forward), most)
