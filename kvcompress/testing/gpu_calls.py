"""What is checked and timed on a GPU: every operation, at settings that are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvcompress import ops
from kvcompress.arrays import FLOAT16_MAX, FLOATING, Array, array_namespace, dtype_of, namespace_of
from kvcompress.backend import Backend
from kvcompress.ops.affine import AffineSpec
from kvcompress.ops.packing import packed_size
from kvcompress.ops.rotated import RotatedSpec
from kvcompress.testing import conformance

SHAPE = (64, 8192, 128)
"""Heads, tokens and channels of what is timed: 64 Mi values."""

AXES: tuple[Literal["channel", "token"], ...] = ("channel", "token")
BITS = (2, 3, 4, 8)
GROUP = 64
VECTOR = 4
_HEADS, _BLOCK = 8, 16


@dataclass(frozen=True)
class Call:
    """One call that is checked and timed.

    Attributes
    ----------
    op : str
    setting, dtype, bits : str
        Columns of the table.
    arrays : tuple of arrays
    static : dict
        Keywords of the generic operation.
    dtype_out : str or None
        What the kernel narrows its result to, if it does.
    """

    op: str
    setting: str
    dtype: str
    bits: str
    arrays: tuple[Array, ...]
    static: dict[str, Any]
    dtype_out: str | None = None

    @property
    def overwrites(self) -> bool:
        """Whether the first array is changed."""
        return self.op == "scatter_slots"

    def kernel(self, backend: Backend) -> tuple[Array, ...]:
        """Call the backend."""
        static = self.static if self.dtype_out is None else {**self.static, "dtype": self.dtype_out}
        return as_tuple(getattr(backend, self.op)(*self.arrays, **static))

    def generic(self) -> tuple[Array, ...]:
        """Call the generic operation."""
        result = as_tuple(conformance.generic(self.op)(*self.arrays, **self.static))
        return result if self.dtype_out is None else (ops.cast(result[0], dtype=self.dtype_out),)


def calls(array: Callable[[Any], Array], shape: tuple[int, int, int]) -> Iterator[Call]:
    """All calls, at the size that is timed; one tensor at a time. None needs a kernel's results.

    `array` copies an array from the host.
    """
    channels = shape[-1]
    for dtype in FLOATING:
        x = array(normal(shape, dtype, seed=0))
        for axis in AXES:
            for bits in BITS:
                spec = AffineSpec(bits, GROUP, axis)
                yield Call("quantize", f"per {axis}", dtype, str(bits), (x,), {"spec": spec})
                encoded = ops.quantize(x, spec=spec)
                static = {"spec": spec, "channels": channels}
                yield Call("dequantize", f"per {axis}", dtype, str(bits), encoded, static, dtype)
            static = {"spec": AffineSpec(2, GROUP, axis)}
            yield Call("clip_groups", f"per {axis}", dtype, "2", (x,), static)
        for bits in BITS:
            rotated = RotatedSpec(bits, 0)
            yield Call("quantize_rotated", "", dtype, str(bits), (x,), {"spec": rotated})
            coded = ops.quantize_rotated(x, spec=rotated)
            static = {"spec": rotated, "channels": channels}
            yield Call("dequantize_rotated", "", dtype, str(bits), coded, static, dtype)
    heads, tokens, _ = shape
    x = array(normal(shape, "float16", seed=0))
    yield Call("within", "", "float16", "", (x,), {"limit": FLOAT16_MAX})
    # As an engine has them: tokens of a few heads, in blocks of 16 that are in no order.
    held = _HEADS if heads % _HEADS == 0 else heads
    count = heads * tokens // held
    blocks = np.random.default_rng(4).permutation(-(-count // _BLOCK))
    slots = array((blocks[:, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1).astype("int32"))
    pool = array_namespace(x).reshape(x, (count, held, channels))
    pool = array_namespace(x).concat([pool, pool[: slots.shape[0] - count]])
    yield Call("gather_slots", f"blocks of {_BLOCK}", "float16", "", (pool, slots), {})
    rows = array(normal((held, slots.shape[0], channels), "float16", seed=6))
    yield Call("scatter_slots", f"blocks of {_BLOCK}", "float16", "", (pool, slots, rows), {})
    del rows
    yield Call("within_paged", "", "float16", "", (pool, slots), {"limit": FLOAT16_MAX})
    for axis in AXES:
        spec = AffineSpec(4, GROUP, axis)
        yield Call("quantize_paged", f"per {axis}", "float16", "4", (pool, slots), {"spec": spec})
    static = {"spec": RotatedSpec(4, 0)}
    yield Call("quantize_rotated_paged", "", "float16", "4", (pool, slots), static)
    del x, pool, slots
    vectors = array(normal((heads * tokens * channels // VECTOR, VECTOR), "float32", seed=1))
    book = vectors[:256]
    rate = str(8 // VECTOR)
    yield Call("nearest", f"256 x {VECTOR}", "float32", rate, (vectors, book), {})
    codes = array(_codes(vectors.shape[:1], seed=7).astype("int32"))
    yield Call("lookup", f"256 x {VECTOR}", "float32", rate, (codes, book), {})
    del vectors, codes
    x = array(normal(shape, "float32", seed=2))
    books = [
        array(normal((heads, 256, VECTOR), "float32", seed=i)) for i in range(channels // VECTOR)
    ]
    yield Call("encode_product", f"256 x {VECTOR}", "float32", rate, (x, *books), {})
    codes = array(_codes((heads, tokens, len(books)), seed=8))
    yield Call("decode_product", f"256 x {VECTOR}", "float32", rate, (codes, *books), {})
    del books, codes
    total = 3 * channels
    variances = array(normal((heads, channels), "float32", seed=5) ** 2)
    component_bits = ops.allocate(variances, total)
    static = {"bits": total}
    yield Call("quantize_allocated", "", "float32", "3", (x, component_bits), static)
    packed = array(_codes((heads, tokens, packed_size(total, 1)), seed=9))
    yield Call("dequantize_allocated", "", "float32", "3", (packed, component_bits), static)


def normal(shape: tuple[int, ...], dtype: str, *, seed: int) -> np.ndarray[Any, Any]:
    """Draw on the host."""
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return x.astype(dtype_of(namespace_of(np), dtype), copy=False)


def as_tuple(result: Any) -> tuple[Array, ...]:
    """Results as a tuple, of one as well."""
    return result if isinstance(result, tuple) else (result,)


def _codes(shape: tuple[int, ...], *, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype="uint8")
