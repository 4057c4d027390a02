"""Transform coding: principal components in the metric of attention, product-quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from kvcompress._namespace import Array, array_namespace, astype, device
from kvcompress.backend import Ops
from kvcompress.errors import CalibrationError, SettingError, check_fraction
from kvcompress.layer_statistics import HostArray, LayerStatistics
from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.ops.outliers import gather_rows, largest, put_rows
from kvcompress.ops.product import decode_product, encode_product
from kvcompress.training import RoleCode, code_bytes, train_keys, train_values

NORM_STEP = 12 / 254
"""Octaves between the norms that neighbouring bytes stand for: 12 in all, about the mean."""


@dataclass(frozen=True)
class TransformCoding(Method):
    """Code keys and values in bases in which errors are what attention sees of them.

    Keys go to the basis in which the squared error of the coefficients is the mean square error of
    the attention logits, and their covariance is diagonal; values are divided by their norms, which
    take a byte each, and go to their principal components. The components, by falling variance, are
    cut into sub-vectors that deserve a byte each, by reverse water-filling (Cover and Thomas,
    Elements of Information Theory, section 10.3.3) with one water level for keys and values; a byte
    names the nearest of 256 centroids trained on real tokens. Bases and codebooks come from the
    calibration: they belong to the model, and are not part of what is compressed, which carries the
    fingerprint of the calibration only.

    Parameters
    ----------
    bits : float
        Bits per value, over keys and values together, 0.25 to 8; met up to the rounding to whole
        bytes per head and token, and without the `exact` tokens.
    calibration : LayerStatistics
        Of the layer to be compressed, ``calibration[layer]`` of a `Calibration`. A fingerprint
        alone, as what is compressed carries it, can be compared but not used.
    exact : float
        Share of the tokens of every head whose keys are coded worst and so kept as they are, in
        [0, 1]; each costs its dtype and 32 bits.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    bits: float
    calibration: LayerStatistics | str
    exact: float = 0.0

    def __post_init__(self) -> None:
        bits: Any = self.bits
        number = isinstance(bits, int | float) and not isinstance(bits, bool)
        if not number or not 0.25 <= bits <= 8:
            raise SettingError(f"bits must be a number from 0.25 to 8, got {bits!r}")
        if not isinstance(self.calibration, LayerStatistics | str):
            raise SettingError(
                "calibration must be the statistics of a layer, calibration[layer], "
                f"got {type(self.calibration).__name__}"
            )
        check_fraction("exact", self.exact)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the calibration."""
        known = self.calibration
        return known if isinstance(known, str) else known.fingerprint

    def detach(self) -> Self:
        return replace(self, calibration=self.fingerprint)

    def attach(self, method: Method) -> Self:
        if not isinstance(self.calibration, str):
            return self
        if not isinstance(method, TransformCoding) or isinstance(method.calibration, str):
            raise CalibrationError(
                f"this was compressed with calibration {self.fingerprint[:12]}; decompress it with "
                "a KVCacheCompressor whose method is a TransformCoding with that calibration"
            )
        if method.fingerprint != self.fingerprint:
            raise CalibrationError(
                f"this was compressed with calibration {self.fingerprint[:12]}, "
                f"not with {method.fingerprint[:12]}"
            )
        return replace(self, calibration=method.calibration)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": type(self).__name__,
            "bits": self.bits,
            "calibration": self.fingerprint,
            "exact": self.exact,
        }

    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        heads, tokens, head_dim = spec.shape
        statistics = self._statistics
        known_heads, _, known_dim = (
            statistics.key_rows if role == "keys" else statistics.value_rows
        ).shape
        if head_dim != known_dim or heads % known_heads:
            raise SettingError(
                f"the calibration knows {known_heads} heads of {known_dim} {role}, "
                f"got {heads} of {head_dim}"
            )
        codes = TensorSpec((heads, tokens, self._code_bytes(role)), "uint8")
        if role == "values":
            return {"codes": codes, "norms": TensorSpec((heads, tokens), "uint8")}
        kept = math.ceil(self.exact * tokens)
        return {
            "codes": codes,
            "exact_index": TensorSpec((heads, kept), "int32"),
            "exact_value": TensorSpec((heads, kept, head_dim), spec.dtype),
        }

    def encode(self, x: Array, role: Role, ops: Ops) -> Payload:
        encode = self._encode_keys if role == "keys" else self._encode_values
        return encode(x, _Tables(self._train(role), x), ops)

    def decode(self, payload: Payload, spec: TensorSpec, role: Role, ops: Ops) -> Array:
        codes = payload["codes"]
        tables = _Tables(self._train(role), codes)
        x = ops(decode_product, tables.fold(codes), *tables.codebooks) @ tables.backward
        x = tables.unfold(x + tables.mean, codes)
        if role == "keys":
            exact = astype(payload["exact_value"], "float32")
            return put_rows(x, payload["exact_index"], exact)
        return x * self._norms(payload["norms"])[..., None]

    def _encode_keys(self, x: Array, tables: _Tables, ops: Ops) -> Payload:
        xp = array_namespace(x)
        y = (tables.fold(astype(x, "float32")) - tables.mean) @ tables.forward
        codes = ops(encode_product, y, *tables.codebooks)
        error = xp.zeros_like(y)
        if self.exact:
            error = xp.clip(y - ops(decode_product, codes, *tables.codebooks), -(2.0**60), 2.0**60)
        error = tables.unfold(xp.sum(error * error, axis=-1, keepdims=True), x)[..., 0]
        index = largest(error, math.ceil(self.exact * x.shape[1]))
        return {
            "codes": tables.unfold(codes, x),
            "exact_index": index,
            "exact_value": gather_rows(x, index),
        }

    def _encode_values(self, x: Array, tables: _Tables, ops: Ops) -> Payload:
        xp = array_namespace(x)
        full = tables.fold(astype(x, "float32"))
        # Scaled by the largest magnitude first, so that squares neither overflow nor vanish.
        peak = xp.max(xp.abs(full), axis=-1, keepdims=True)
        full = full / xp.where(peak > 0, peak, 1.0)
        norm = xp.sqrt(xp.sum(full * full, axis=-1, keepdims=True))
        unit = full / xp.where(norm > 0, norm, 1.0)
        projected = unit @ tables.forward
        shift = tables.mean @ tables.forward
        codes = ops(encode_product, projected - shift, *tables.codebooks)
        # The decoded direction is d = mean + decoded @ backward; the best norm is <x, d> / <d, d>.
        decoded = ops(decode_product, codes, *tables.codebooks)
        along = xp.sum(projected * decoded, axis=-1, keepdims=True) + unit @ xp.matrix_transpose(
            tables.mean
        )
        power = xp.sum(decoded * (decoded + 2 * shift), axis=-1, keepdims=True) + xp.sum(
            tables.mean * tables.mean, axis=-1, keepdims=True
        )
        gain = xp.where(along > 0, along / xp.where(power > 0, power, 1.0), 1.0)
        norm = xp.where(peak > 0, norm * peak * gain, 0.0)
        return {
            "codes": tables.unfold(codes, x),
            "norms": self._norm_codes(tables.unfold(norm, x)[..., 0]),
        }

    def _norm_codes(self, norm: Array) -> Array:
        """Bytes for norms ``[heads, tokens]``: 0 for zero, else 1 to 255 by the logarithm."""
        xp = array_namespace(norm)
        octave = xp.log2(xp.where(norm > 0, norm, 1.0)) - self._log_norm(norm)
        code = xp.clip(xp.round(octave / NORM_STEP) + 128.0, 1.0, 255.0)
        return xp.astype(xp.where(norm > 0, code, 0.0), xp.uint8)

    def _norms(self, codes: Array) -> Array:
        xp = array_namespace(codes)
        octave = (xp.astype(codes, xp.float32) - 128.0) * NORM_STEP + self._log_norm(codes)
        return xp.where(codes > 0, xp.exp(octave * math.log(2.0)), 0.0)

    def _log_norm(self, like: Array) -> Array:
        xp = array_namespace(like)
        known = self._statistics.value_log_norm.astype(np.float32)
        log_norm = xp.asarray(np.tile(known, like.shape[0] // known.shape[0]), device=device(like))
        return log_norm[:, None]

    @property
    def _statistics(self) -> LayerStatistics:
        if isinstance(self.calibration, str):
            raise CalibrationError(
                f"calibration {self.calibration[:12]} is only named here, not present"
            )
        return self.calibration

    def _code_bytes(self, role: Role) -> int:
        return code_bytes(self._statistics, self.bits)[role == "values"]

    def _train(self, role: Role) -> RoleCode:
        train = train_keys if role == "keys" else train_values
        return train(self._statistics, self._code_bytes(role))


class _Tables:
    """A `RoleCode` in the library and on the device of `like`."""

    def __init__(self, code: RoleCode, like: Array) -> None:
        xp = array_namespace(like)

        def move(x: HostArray) -> Array:
            return xp.asarray(x, device=device(like))

        self.mean, self.forward, self.backward = map(move, (code.mean, code.forward, code.backward))
        self.codebooks = tuple(map(move, code.codebooks))
        self._heads = code.mean.shape[0]

    def fold(self, x: Array) -> Array:
        """``[batch * heads, tokens, n]`` to ``[heads, batch * tokens, n]``."""
        xp = array_namespace(x)
        rows, tokens, n = x.shape
        x = xp.reshape(x, (rows // self._heads, self._heads, tokens, n))
        return xp.reshape(
            xp.permute_dims(x, (1, 0, 2, 3)), (self._heads, rows // self._heads * tokens, n)
        )

    def unfold(self, x: Array, like: Array) -> Array:
        """Undo `fold`, for as many rows and tokens as `like` has."""
        xp = array_namespace(x)
        (rows, tokens), n = like.shape[:2], x.shape[-1]
        x = xp.reshape(x, (self._heads, rows // self._heads, tokens, n))
        return xp.reshape(xp.permute_dims(x, (1, 0, 2, 3)), (rows, tokens, n))
