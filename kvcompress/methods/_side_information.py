"""Numbers of which a group of values needs few, such as gains and ranges: a byte for each.

They vary slowly along the tokens, so 8 bits in groups of 32 tokens are enough, and cost little more
than half of 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.methods.base import Payload, TensorSpec
from kvcompress.ops.affine import AffineSpec, dequantize, quantize


@dataclass(frozen=True)
class Bytes:
    """Numbers ``[heads, tokens, columns]`` in three arrays of a payload, of these names."""

    codes: str
    minimum: str
    maximum: str

    def encoded_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Arrays of the payload for numbers of this shape and dtype."""
        affine, (heads, tokens, columns) = _affine(spec.dtype), spec.shape
        one_each = TensorSpec((heads, *affine.range_shape(tokens, columns)), spec.dtype)
        return {
            self.codes: TensorSpec((heads, *affine.codes_shape(tokens, columns)), "uint8"),
            self.minimum: one_each,
            self.maximum: one_each,
        }

    def encode(self, x: Array, dispatch: Dispatcher) -> Payload:
        """Quantize ``x [heads, tokens, columns]``."""
        parts = dispatch(quantize, x, spec=_affine(dtype_name(x.dtype)))
        return dict(zip((self.codes, self.minimum, self.maximum), parts, strict=True))

    def decode(self, payload: Payload, spec: TensorSpec, dispatch: Dispatcher) -> Array:
        """Undo `encode`, in float32."""
        parts = payload[self.codes], payload[self.minimum], payload[self.maximum]
        static = {"spec": _affine(spec.dtype), "channels": spec.shape[-1]}
        return dispatch(dequantize, *parts, **static)


GAINS = Bytes("gain_codes", "gain_min", "gain_max")
"""One number for every token."""

RANGES = Bytes("ranges", "ranges_min", "ranges_max")
"""All minima, then all maxima, of the groups."""


def _affine(dtype: str) -> AffineSpec:
    return AffineSpec(8, 32, "channel", dtype)
