"""What a layer group is coded with: a basis and the tables of an entropy coder, trained once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from kvcompress.arrays import HostArray, digest
from kvcompress.cross_layer.format import check_parameters, read_group
from kvcompress.cross_layer.layer_group import LayerGroup
from kvcompress.cross_layer.metric import Metric
from kvcompress.entropy.context_model import ContextModel
from kvcompress.files import Facts

HALF, BYTE = 8.0, 1.0
"""Root mean squares of coefficients, in steps, from which their row of the basis is half floats, or
bytes; others are nibbles."""

CLIP = 2.6
"""Magnitude of a nibble, over the root mean square of a row: as small an error as one can have."""


@dataclass(frozen=True, eq=False)
class CrossLayerParameters:
    """Basis and entropy tables of a layer group at one rate; NumPy arrays on the host.

    Belongs to the model, like its tokenizer: what is compressed carries the fingerprint only.

    Attributes
    ----------
    group : LayerGroup
    bits : float
        Bits per value it was trained for.
    mean : array ``[width]``, float32
        Of the rows.
    metric_roots : array, float16
        Of the `metric`.
    step : array ``[1]``, float32
        Of the quantizer, of rows weighed by the metric, for tokens of level zero.
    basis_half : array ``[largest components, width]``, float16
    basis_byte : array ``[next components, width]``, int8
    basis_nibble : array ``[all others, (width + 1) // 2]``, uint8
        Two numbers to a byte, the first the lower, eight more than they are.
    basis_scale : array ``[components]``, float32
        What every row of the basis is multiplied by.
    importance : array ``[first components]``, float32
        What each coefficient, in steps, adds to the binary logarithm of the importance of a token.
    level_frequencies : array ``[2 * REACH + 1]``, uint16
        Of the levels of tokens; see `token_levels`.
    classes : array ``[components]``, uint8
        Of every component; see `ContextModel`.
    residual_classes : array ``[width]``, uint8
        Of the residuals of every number, in steps, for tokens whose residuals are coded.
    limit : array ``[1]``, float32
        Squared error, in steps, beyond which the residual of a token is coded too.
    rounding : array ``[CLASSES]``, float32
        Magnitude, above a whole number, from which coefficients of a class are rounded up.
    centres : array ``[2, CLASSES]``, float32
        How much nearer to zero than the whole number coefficients are restored: those of magnitude
        one, and larger ones.
    frequencies, magnitudes, thresholds : arrays
        Of `model`.
    """

    group: LayerGroup
    bits: float
    mean: HostArray
    metric_roots: HostArray
    step: HostArray
    basis_half: HostArray
    basis_byte: HostArray
    basis_nibble: HostArray
    basis_scale: HostArray
    importance: HostArray
    level_frequencies: HostArray
    classes: HostArray
    residual_classes: HostArray
    limit: HostArray
    rounding: HostArray
    centres: HostArray
    frequencies: HostArray
    magnitudes: HostArray
    thresholds: HostArray

    @property
    def arrays(self) -> Mapping[str, HostArray]:
        """Every array, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)[2:]}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, which every machine that restores caches needs."""
        return sum(x.nbytes for x in self.arrays.values())

    @property
    def components(self) -> int:
        """How many components a token has."""
        return len(self.basis_scale)

    @cached_property
    def model(self) -> ContextModel:
        """Tables of the entropy coder."""
        return ContextModel(self.frequencies, self.magnitudes, self.thresholds)

    @cached_property
    def metric(self) -> Metric:
        """What rows are weighed by, so that errors count alike."""
        return Metric(self.group, self.metric_roots.astype(np.float32))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the layer group and all arrays, in hexadecimal."""
        group = json.dumps(self.group.to_dict(), sort_keys=True).encode()
        return digest({**self.arrays, "group": np.frombuffer(group, np.uint8)})

    @property
    def backward(self) -> HostArray:
        """What takes coefficients to rows, in steps: float32 ``[components, width]``."""
        packed = self.basis_nibble
        pairs = np.stack([packed & 15, packed >> 4], axis=-1)
        pairs = pairs.reshape(len(packed), 2 * packed.shape[1])
        nibbles = pairs[:, : self.group.width].astype(np.float32) - 8
        rows = np.concatenate([self.basis_half, self.basis_byte, nibbles], dtype=np.float32)
        rows *= self.basis_scale[:, None]
        return rows

    @property
    def forward(self) -> HostArray:
        """What takes rows to coefficients: float32 ``[width, components]``.

        Rows of nibbles are not quite orthogonal to those of the largest components, which are not
        to show in the coefficients of others.
        """
        rows = self.backward
        count = len(self.basis_half) + len(self.basis_byte)
        large, others = rows[:count], rows[count:]
        others -= (others @ large.T) @ large
        return np.ascontiguousarray(rows.T)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CrossLayerParameters) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return (
            f"CrossLayerParameters({len(self.group.layers)} layers, {self.bits:g} bits, "
            f"{self.components} of {self.group.width} components, {self.nbytes:,} bytes, "
            f"{self.fingerprint[:12]})"
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that is not an array, as JSON can carry it."""
        return {"group": self.group.to_dict(), "bits": self.bits}

    @classmethod
    def of(cls, facts: Facts, arrays: Mapping[str, HostArray]) -> CrossLayerParameters:
        """Undo `facts` and `arrays`.

        Raises
        ------
        CalibrationError, SettingError
            If they are not such facts and arrays, or restore numbers that are not finite.
        """
        group = read_group(facts.object("group", "layers", "shapes"))
        bits = facts.number("bits", 0, 16)
        check_parameters(group, arrays)
        return cls(group, bits, **arrays)


def store_basis(vectors: HostArray, sizes: HostArray) -> Mapping[str, HostArray]:
    """Arrays of a `CrossLayerParameters` that hold a basis.

    An error of a component's row costs its square times the component's variance: half floats,
    bytes or nibbles cost about a hundredth of what the rounding of coefficients costs anyway.

    Parameters
    ----------
    vectors : array ``[components, width]``, float32
        Orthonormal rows.
    sizes : array ``[components]``
        Root mean square of the coefficients, in steps, falling.
    """
    first, last = (int(np.sum(sizes >= limit)) for limit in (HALF, BYTE))
    peak = np.maximum(np.max(np.abs(vectors), axis=1, keepdims=True), 1e-30)
    ordinary = np.sqrt(np.mean(np.square(vectors), axis=1, keepdims=True))
    half = (vectors[:first] / peak[:first]).astype(np.float16)
    byte = np.rint(vectors[first:last] * (127 / peak[first:last])).astype(np.int8)
    reach = np.minimum(peak, CLIP * ordinary)[last:]
    nibble = np.clip(np.rint(vectors[last:] * (7 / reach)), -7, 7)
    # Rounded rows have other norms than those they stand for.
    norms = [np.linalg.norm(x.astype(np.float32), axis=1) for x in (half, byte, nibble)]
    scale = 1 / np.maximum(np.concatenate(norms), 1e-30)
    parameters = np.pad((nibble + 8).astype(np.uint8), ((0, 0), (0, vectors.shape[1] % 2)))
    return {
        "basis_half": half,
        "basis_byte": byte,
        "basis_nibble": parameters[:, ::2] | parameters[:, 1::2] << 4,
        "basis_scale": scale.astype(np.float32),
    }
