"""Transform coding: principal components in the metric of attention, product-quantized."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from kvcompress.arrays import Array, astype
from kvcompress.backend import Dispatcher
from kvcompress.calibration.parameters import LayerParameters
from kvcompress.calibration.statistics import LayerStatistics
from kvcompress.calibration.training import Scope, train
from kvcompress.errors import (
    CalibrationError,
    SettingError,
    check_fraction,
    check_number,
    normalize,
)
from kvcompress.methods import _own_transform, _trained_transform
from kvcompress.methods._heads import join_heads, split_heads
from kvcompress.methods.base import Method, Payload, Role, TensorSpec
from kvcompress.ops.outliers import gather_rows, largest, put_rows
from kvcompress.rope import RoPE

LEAST, MOST = 0.25, 8.0
"""Bits per value that can be asked for."""

EXACT = 0.005
"""Share of the keys kept exact, where nothing else is said."""


@dataclass(frozen=True)
class TransformCoding(Method):
    """Code keys and values in bases in which errors are what attention sees of them.

    With a calibration, keys go to the basis in which the squared error of the coefficients is the
    mean square error of the attention logits, and their covariance is diagonal; values are divided
    by their norms, which take a byte each, and go to their principal components. A key whose norm
    lies outside the range that the calibration saw is scaled to a usual norm first; norms of keys
    take a byte each, too. Where the calibration knows the model's RoPE, keys are coded before it
    (Hooper et al. 2024, arXiv 2401.18079), and so positions do not matter. The components are dealt
    out into sub-vectors that deserve a byte each, by reverse water-filling (Cover and Thomas,
    Elements of Information Theory, section 10.3.3) with one water level for keys and values; a byte
    names the nearest of 256 centroids trained on real tokens. Bases and codebooks belong to the
    model, and are not part of what is compressed, which carries their fingerprint only.

    Without a calibration, keys and directions of values go to the principal components of the
    tensor itself, each of which gets the whole number of bits that lowers the squared error most,
    and is coded by Lloyd-Max levels. Bases are part of what is compressed, a byte per number, so
    bits per value are ``8 * head_dim / seq_len`` more.

    Parameters
    ----------
    bits : float
        Bits per value, 0.25 to 8. With a calibration, over keys and values together, met up to the
        rounding to whole bytes per head and token; without one, for keys and values alike, bases
        not included. The `exact` tokens come on top.
    calibration : LayerStatistics or LayerParameters, optional
        Of the layer to be compressed: ``calibration[layer]`` of a `Calibration`, on which bases and
        codebooks are trained at first use, or what was trained so (`plan` trains, and saves). A
        fingerprint alone, as what is compressed carries it, can be compared but not used.
    exact : float
        Share of the tokens of every unit whose keys are coded worst and so kept as they are, in
        [0, 1], up to the rounding of their dtype if RoPE is undone; each costs its dtype and 32
        bits. Worth more than the same bits in codes.
    scope : {"head", "layer"}
        What a calibration codes together: the heads of a layer have much in common, so all of them
        take less; a head by itself can be read without the others.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    identifier = "TransformCoding"

    bits: float
    calibration: LayerStatistics | LayerParameters | str | None = None
    exact: float = EXACT
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        bits = check_number("bits", self.bits, LEAST, MOST)
        known = self.calibration
        if not isinstance(known, LayerStatistics | LayerParameters | str | None):
            raise SettingError(
                "calibration must be the statistics of a layer, calibration[layer], "
                f"got {type(known).__name__}"
            )
        if isinstance(known, LayerParameters) and known.bits != bits:
            raise SettingError(f"this was trained for {known.bits} bits per value, not {bits}")
        normalize(self, bits=bits, exact=check_fraction("exact", self.exact))
        if self.scope not in ("head", "layer"):
            raise SettingError(f'scope must be "head" or "layer", got {self.scope!r}')

    @property
    def parameters(self) -> LayerParameters | None:
        """Bases and codebooks, trained if need be; None without a calibration.

        Raises
        ------
        CalibrationError
            If only a fingerprint is known.
        """
        if isinstance(self.calibration, str):
            raise CalibrationError(
                f"calibration {self.calibration[:12]} is only named here, not present"
            )
        if isinstance(self.calibration, LayerStatistics):
            return train(self.calibration, self.bits, self.scope)
        return self.calibration

    @property
    def rope(self) -> RoPE | None:
        """The rotary embedding that the calibration has undone.

        Raises
        ------
        CalibrationError
            If only a fingerprint is known.
        """
        if isinstance(self.calibration, LayerStatistics):
            return self.calibration.rope
        parameters = self.parameters
        return parameters.rope if parameters else None

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of `parameters`, None without a calibration."""
        known = self.calibration if isinstance(self.calibration, str) else self.parameters
        return known.fingerprint if isinstance(known, LayerParameters) else known

    def detach(self) -> Self:
        return replace(self, calibration=self.fingerprint)

    def attach(self, method: Method | None) -> Self:
        if not isinstance(self.calibration, str):
            return self
        known = method.calibration if isinstance(method, TransformCoding) else None
        if known is None or isinstance(known, str):
            raise CalibrationError(
                f"this was compressed with calibration {self.calibration[:12]}; decompress it with "
                "a KVCacheCompressor whose method is a TransformCoding with that calibration"
            )
        # Statistics can be trained for any rate, also for that of another compressor.
        parameters = (
            known if isinstance(known, LayerParameters) else train(known, self.bits, self.scope)
        )
        if parameters.fingerprint != self.calibration:
            raise CalibrationError(
                f"this was compressed with calibration {self.calibration[:12]}, "
                f"not with {parameters.fingerprint[:12]}"
            )
        return replace(self, calibration=parameters)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.identifier,
            "bits": self.bits,
            "calibration": self.fingerprint,
            "exact": self.exact,
            "scope": self.scope,
        }

    @classmethod
    def presets(cls, head_dims: Collection[int], /) -> tuple[Self, ...]:
        return tuple(cls(bits) for bits in (1, 2, 3, 4))

    @classmethod
    def at_bits(cls, bits: float, /) -> Self | None:
        return cls(bits) if LEAST <= bits <= MOST else None

    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        parameters = self.parameters
        payload = dict(
            _trained_transform.encoded_spec(parameters, spec, role)
            if parameters
            else _own_transform.encoded_spec(self.bits, spec)
        )
        if kept := self._kept(spec.shape[1], role):
            heads, _, head_dim = spec.shape
            together = self._together
            rows, width = heads // together, head_dim * together
            payload["exact_index"] = TensorSpec((rows, kept), "int32", spec.shape[1])
            payload["exact_value"] = TensorSpec((rows, kept, width), spec.dtype)
        return payload

    def encode(self, x: Array, role: Role, dispatch: Dispatcher) -> Payload:
        if parameters := self.parameters:
            payload, errors = _trained_transform.encode(parameters, x, role, dispatch)
        else:
            payload, errors = _own_transform.encode(self.bits, x, dispatch)
        if kept := self._kept(x.shape[1], role):
            index = largest(errors(), kept)
            exact = gather_rows(join_heads(x, self._together), index)
            payload |= {"exact_index": index, "exact_value": exact}
        return payload

    def decode(self, payload: Payload, spec: TensorSpec, role: Role, dispatch: Dispatcher) -> Array:
        if parameters := self.parameters:
            x = _trained_transform.decode(parameters, payload, role, dispatch)
        else:
            x = _own_transform.decode(self.bits, payload, spec, dispatch)
        if self._kept(spec.shape[1], role):
            together, exact = self._together, astype(payload["exact_value"], "float32")
            x = join_heads(x, together)
            x = put_rows(x, payload["exact_index"], exact, overwrite=True)
            x = split_heads(x, together)
        return x

    def _kept(self, tokens: int, role: Role) -> int:
        """Keys that are kept as they are: none of a few tokens, one of a hundred."""
        return math.floor(self.exact * tokens + 0.5) if role == "keys" else 0

    @property
    def _together(self) -> int:
        """Heads that are coded together."""
        parameters = self.parameters
        return _trained_transform.heads_together(parameters) if parameters else 1
