"""Gain-shape quantization: a rotated token is coded channel by channel, and its gain apart.

TurboQuant, Zandieh et al. 2025, arXiv 2504.19874. The gain is not the token's norm but what brings
the decoded token closest to it: ``<y, c> / <c, c>`` for the rotated token y and its levels c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvcompress.arrays import (
    Array,
    HostArray,
    array_namespace,
    astype,
    device,
    look_up,
    map_blocks,
    quotient,
    values_at_a_time,
)
from kvcompress.ops.affine import TINY
from kvcompress.ops.casting import cast
from kvcompress.ops.hadamard import hadamard, inverse_hadamard
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.lloyd_max import CELLS_PER_UNIT, LARGEST, cells, levels
from kvcompress.ops.packing import CODE_BITS, pack, packed_size, unpack
from kvcompress.ops.registry import Rounded, operation

FAINT = 2.0**-90
"""Magnitudes over the largest of their token that count as zero."""


@dataclass(frozen=True)
class RotatedSpec:
    """How `quantize_rotated` codes ``[..., tokens, channels]``.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 8.
    seed : int
        Of the signs of the rotation.
    """

    bits: int
    seed: int

    def codes_shape(self, tokens: int, channels: int) -> tuple[int, int]:
        """Shape ``[tokens, bytes]`` of the packed codes."""
        return tokens, packed_size(channels, self.bits)


def _specs(inputs: Inputs) -> Iterator[tuple[RotatedSpec, str]]:
    """Settings, and what tables call them."""
    for bits in inputs.choose(every=range(1, 9), usual=CODE_BITS, typical=(4,)):
        for seed in inputs.choose(every=(0, 7), usual=(0,)):
            yield RotatedSpec(bits, seed), f"{bits} bits, rotated"


def _quantize_examples(inputs: Inputs) -> Iterator[Call]:
    x, power_of_two = inputs.tensor(), inputs.channels & (inputs.channels - 1) == 0
    for spec, label in _specs(inputs):
        if power_of_two or inputs.level != "every":  # or libraries need not agree
            yield Call((x,), {"spec": spec}, label)


@operation(_quantize_examples, paged=True)
def quantize_rotated(x: Array, *, spec: RotatedSpec) -> tuple[Array, Array]:
    """Rotate every token at random, quantize it, and pack the codes.

    Codes and gains are the same bits on all libraries where the number of channels is a power of
    two: sums are of integers, or of two terms in a fixed order.

    Parameters
    ----------
    x : array ``[..., tokens, channels]``, floating
        Finite, magnitudes at most 2**126. Tokens of magnitudes under 2**-100 count as zero.
    spec : RotatedSpec

    Returns
    -------
    codes : array ``[..., *spec.codes_shape(tokens, channels)]``, uint8
    gain : array ``[..., tokens, 1]``, float32
        At least 0; of the size of the token's root mean square.
    """
    xp = array_namespace(x)
    *lead, channels = x.shape
    x = xp.reshape(x, (math.prod(lead), channels))
    codes, gain = map_blocks(partial(_quantize_rows, spec=spec), _rows(x, channels), x)
    return xp.reshape(codes, (*lead, codes.shape[-1])), xp.reshape(gain, (*lead, 1))


def _quantize_rows(x: Array, *, spec: RotatedSpec) -> tuple[Array, Array]:
    xp, shape = array_namespace(x), x.shape
    x = astype(x, "float32")
    # By the peak, so that nothing overflows, then by the root mean square.
    peak = xp.max(xp.abs(x), axis=-1, keepdims=True)
    zero = peak < TINY
    x = x * quotient(1.0, peak, zero)
    # Where numbers cancel, these would be left, denormal: libraries differ in whether they are 0.
    x = hadamard(xp.where(xp.abs(x) < FAINT, 0.0, x), seed=spec.seed)
    rms = _sqrt(_dot(x, x) / shape[-1])
    # Between two products, so that no compiler multiplies the factors first.
    x = xp.where(zero, 0.0, x) * quotient(1.0, rms, zero)
    table = xp.asarray(cells(spec.bits), device=device(x))
    cell = xp.floor(x * CELLS_PER_UNIT) + float(LARGEST * CELLS_PER_UNIT)
    cell = xp.clip(cell, 0.0, table.shape[0] - 1.0)
    codes = look_up(table, xp.astype(cell, xp.int32))
    level = _levels(codes, spec.bits)
    # The smallest levels of many channels may be rounded to zero.
    gain = peak * rms * (_dot(x, level) / xp.where(zero, 1.0, _dot(level, level)))
    return pack(codes, spec.bits), xp.where(zero, 0.0, gain)


def _dequantize_examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor()
    for spec, label in _specs(inputs):
        static = {"spec": spec, "channels": inputs.channels, "dtype": inputs.dtype}
        yield Call(quantize_rotated(x, spec=spec), static, label, source=x)


def _dequantize_bound(call: Call) -> HostArray:
    """Every output is a sum of all levels with weights of at most ``sqrt(2 / n)``, times the gain.

    There is one rounding for each round of the fast part, one for each term of the odd part, and
    four more.
    """
    n, (codes, gain) = call.static["channels"], call.arrays
    power = n & -n
    roundings = n // power + power.bit_length() + 3
    largest = n * float(levels(call.static["spec"].bits)[-1]) * (2 / n) ** 0.5
    bound = 2 * roundings * 2.0**-24 * gain.astype("float64") * largest + 2.0**-126
    return np.broadcast_to(bound, (*codes.shape[:-1], n))


@operation(_dequantize_examples, Rounded(_dequantize_bound))
def dequantize_rotated(
    codes: Array, gain: Array, *, spec: RotatedSpec, channels: int, dtype: str = "float32"
) -> Array:
    """Undo `quantize_rotated`.

    Parameters
    ----------
    codes, gain : arrays
        As `quantize_rotated` returned them; the gain may have been rounded since.
    spec : RotatedSpec
    channels : int
    dtype : {"float16", "bfloat16", "float32"}
        Of the result, to which the float32 values are cast: what exceeds float16 becomes its
        largest.

    Returns
    -------
    array ``[..., tokens, channels]`` of `dtype`
        Magnitudes at most 2**126.
    """
    xp = array_namespace(codes, gain)
    *lead, width = codes.shape
    rows = math.prod(lead)
    codes, gain = xp.reshape(codes, (rows, width)), xp.reshape(gain, (rows, 1))
    decode = partial(_dequantize_rows, spec=spec, channels=channels, dtype=dtype)
    x = map_blocks(decode, _rows(codes, channels), codes, gain)
    return xp.reshape(x, (*lead, channels))


def _dequantize_rows(
    codes: Array, gain: Array, *, spec: RotatedSpec, channels: int, dtype: str
) -> Array:
    xp = array_namespace(codes, gain)
    codes = unpack(codes, spec.bits, channels)
    x = inverse_hadamard(_levels(codes, spec.bits), seed=spec.seed)
    # No source was larger, so this cannot hurt, and float32 cannot overflow.
    return cast(xp.clip(x * astype(gain, "float32"), -(2.0**126), 2.0**126), dtype=dtype)


def _rows(x: Array, channels: int) -> int:
    """Rows that are coded or decoded at a time."""
    values = values_at_a_time(x)
    return max(1, x.shape[0] if values is None else values // channels)


def _sqrt(x: Array) -> Array:
    """Square roots of numbers from 2**-20 to 2, by Heron; PyTorch's are off by a last bit."""
    root = (x + 1.0) / 2
    for _ in range(14):
        root = (root + x / root) / 2
    return root


def _levels(codes: Array, bits: int) -> Array:
    xp = array_namespace(codes)
    table = xp.asarray(levels(bits), device=device(codes))
    return look_up(table, xp.astype(codes, xp.int32))


def _dot(x: Array, y: Array) -> Array:
    """Inner products along the last axis, of products rounded to whole numbers of a unit.

    The root mean squares of `x` and `y` are at most 1.5 or so, hence the sums below 2**24, which
    float32 represents. They are the same in any order, whatever a library takes.
    """
    xp = array_namespace(x, y)
    unit = 2.0 ** (22 - (x.shape[-1] - 1).bit_length())
    products = xp.astype(xp.round(x * y * unit), xp.int32)
    total = xp.sum(products, axis=-1, keepdims=True, dtype=xp.int32)
    return astype(total, "float32") / unit
