"""Affine quantization: groups of values coded as integers between their minimum and maximum.

A group stores its minimum and its maximum, which are values of the source and so exact in the
source's dtype.
Everything is computed in float32, by the one recipe whose codes agree bit for bit on every library:
``code = round_half_even((x - minimum) * (qmax / (maximum - minimum)))``, clipped to ``[0, qmax]``.
Per channel (groups along the tokens) suits keys, per token (groups along the channels) values:
KIVI, Liu et al. 2024, arXiv 2402.02750, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvcompress.arrays import (
    FLOATING,
    Array,
    HostArray,
    array_namespace,
    astype,
    dtype_name,
    extremes,
    quotient,
)
from kvcompress.ops.casting import cast
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.packing import CODE_BITS, pack, packed_size, unpack
from kvcompress.ops.registry import Rounded, operation

TINY = 2.0**-100
"""Ranges and extremes below this count as zero: compilers differ in how they treat denormals."""


AXES: tuple[Literal["channel", "token"], ...] = ("channel", "token")
"""What a group can be of; see `AffineSpec`."""


@dataclass(frozen=True)
class AffineSpec:
    """How `quantize` groups and codes ``[..., tokens, channels]``.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 8.
    group_size : int
        Values in a group; the last group of a row may be shorter.
    axis : {"channel", "token"}
        "channel": a group is `group_size` tokens of one channel; "token": the reverse.
    range_dtype : {"float16", "bfloat16", "float32"} or None
        In what the minimum and the maximum are stored; None stands for the source's dtype, which
        is lossless.
    """

    bits: int
    group_size: int
    axis: Literal["channel", "token"]
    range_dtype: str | None = None

    def codes_shape(self, tokens: int, channels: int) -> tuple[int, int]:
        """Shape ``[tokens, bytes]`` of the packed codes."""
        return tokens, packed_size(channels, self.bits)

    def range_shape(self, tokens: int, channels: int) -> tuple[int, int]:
        """Shape of `minimum` and of `maximum`."""
        if self.axis == "channel":
            return -(-tokens // self.group_size), channels
        return tokens, -(-channels // self.group_size)


def _specs(inputs: Inputs) -> Iterator[tuple[AffineSpec, str]]:
    """Settings, and what tables call them."""
    for bits in inputs.choose(every=(1, 2, 3, 4, 8), usual=CODE_BITS, typical=(4,)):
        for size in inputs.choose(every=(16, 64), usual=(64,)):
            for axis in AXES:
                yield AffineSpec(bits, size, axis), f"{bits} bits, {size} a group, per {axis}"


def _quantize_examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor()
    for spec, label in _specs(inputs):
        yield Call((x,), {"spec": spec}, label)
    if (inputs.level, inputs.dtype) != ("every", "float32"):
        return
    # Ranges that count as none, between extremes that count; and so far from zero that minimum and
    # maximum, rounded, leave values outside.
    tiny = (inputs.integers(inputs.shape, 9, "float32") * 2.0**-23 + 1.0) * 2.0**-99
    far = inputs.tensor(extreme=False) / 16 + 300.0
    for spec, _ in _specs(inputs):
        if (spec.bits, spec.group_size) == (4, 16):
            yield Call((tiny,), {"spec": spec})
            for range_dtype in FLOATING[:2]:
                yield Call((far,), {"spec": AffineSpec(4, 16, spec.axis, range_dtype)})


@operation(_quantize_examples, paged=True)
def quantize(x: Array, *, spec: AffineSpec) -> tuple[Array, Array, Array]:
    """Quantize groups of values between their minimum and maximum, and pack the codes.

    Parameters
    ----------
    x : array ``[..., tokens, channels]``, floating
        Finite, magnitudes at most 2**126.
    spec : AffineSpec

    Returns
    -------
    codes : array ``[..., *spec.codes_shape(tokens, channels)]``, uint8
    minimum, maximum : arrays ``[..., *spec.range_shape(tokens, channels)]``
        A value decodes to within half a step of itself,
        ``(maximum - minimum) / (2**bits - 1) / 2``, plus what rounding the two to
        `spec.range_dtype` moved them.
    """
    xp = array_namespace(x)
    *_, tokens, channels = x.shape
    range_dtype = spec.range_dtype or dtype_name(x.dtype)
    axis = -2 if spec.axis == "channel" else -1
    groups = _group(xp, x, spec.group_size, axis)
    minimum, maximum = (astype(_canonical(xp, a), range_dtype) for a in extremes(groups, axis))
    start = xp.expand_dims(astype(minimum, "float32"), axis=axis)
    extent = xp.expand_dims(astype(maximum, "float32"), axis=axis) - start
    qmax = float(2**spec.bits - 1)
    per_unit = quotient(qmax, extent, extent < TINY)
    groups = (astype(groups, "float32") - start) * per_unit
    groups = xp.astype(xp.clip(xp.round(groups), 0.0, qmax), xp.uint8)
    return pack(_ungroup(xp, groups, tokens, channels, axis), spec.bits), minimum, maximum


def _dequantize_examples(inputs: Inputs) -> Iterator[Call]:
    x = inputs.tensor()
    for spec, label in _specs(inputs):
        arrays = quantize(x, spec=spec)
        dtypes = inputs.choose(
            every=FLOATING if spec.bits == 4 else ("float32",), usual=(inputs.dtype,)
        )
        for dtype in dtypes:
            static = {"spec": spec, "channels": inputs.channels, "dtype": dtype}
            yield Call(arrays, static, label, source=x)


def _dequantize_bound(call: Call) -> HostArray:
    """Four roundings relative to the extent and one to the sum, on either side.

    A fused multiply-add only leaves some out.
    """
    codes, minimum, maximum = (a.astype("float64") for a in call.arrays)
    spec, shape = call.static["spec"], (codes.shape[-2], call.static["channels"])
    largest = np.maximum(abs(minimum), abs(maximum))
    bound = 2 * 2.0**-24 * (5 * (maximum - minimum) + largest) + 2.0**-126
    axis = -2 if spec.axis == "channel" else -1
    repeated: HostArray = np.repeat(bound, spec.group_size, axis=axis)
    return repeated[..., : shape[0], : shape[1]]


@operation(_dequantize_examples, Rounded(_dequantize_bound))
def dequantize(
    codes: Array,
    minimum: Array,
    maximum: Array,
    *,
    spec: AffineSpec,
    channels: int,
    dtype: str = "float32",
) -> Array:
    """Undo `quantize`, up to half a step.

    Parameters
    ----------
    codes, minimum, maximum : arrays
        As `quantize` returned them; minimum and maximum may have been rounded since.
    spec : AffineSpec
    channels : int
    dtype : {"float16", "bfloat16", "float32"}
        Of the result, to which the float32 values are cast: what exceeds float16 becomes its
        largest.

    Returns
    -------
    array ``[..., tokens, channels]`` of `dtype`
    """
    xp = array_namespace(codes, minimum, maximum)
    tokens = codes.shape[-2]
    axis = -2 if spec.axis == "channel" else -1
    codes = unpack(codes, spec.bits, channels)
    groups = _group(xp, xp.astype(codes, xp.float32), spec.group_size, axis)
    start = xp.expand_dims(astype(minimum, "float32"), axis=axis)
    extent = xp.expand_dims(astype(maximum, "float32"), axis=axis) - start
    groups = groups * (extent * (1.0 / (2**spec.bits - 1))) + start
    return cast(_ungroup(xp, groups, tokens, channels, axis), dtype=dtype)


def _canonical(xp: Any, x: Array) -> Array:
    """Zero what is tiny, so that denormals and the sign of zero cannot differ by library."""
    return xp.where(xp.abs(x) < TINY, 0.0, x)


def _group(xp: Any, x: Array, size: int, axis: int) -> Array:
    """``[..., tokens, channels]`` with `axis` cut into ``[groups, size]``, or one shorter group.

    A short last group is filled up with its own last value, which leaves its range alone.
    """
    n = x.shape[axis]
    size = max(1, min(size, n))
    missing = -n % size
    if missing:
        last = x[..., n - 1 :, :] if axis == -2 else x[..., n - 1 :]
        shape = list(last.shape)
        shape[axis] = missing
        x = xp.concat([x, xp.broadcast_to(last, tuple(shape))], axis=axis)
    *lead, tokens, channels = x.shape
    if axis == -2:
        return xp.reshape(x, (*lead, tokens // size, size, channels))
    return xp.reshape(x, (*lead, tokens, channels // size, size))


def _ungroup(xp: Any, groups: Array, tokens: int, channels: int, axis: int) -> Array:
    *lead, a, b, c = groups.shape
    if axis == -2:
        return xp.reshape(groups, (*lead, a * b, c))[..., :tokens, :]
    return xp.reshape(groups, (*lead, a, b * c))[..., :channels]
