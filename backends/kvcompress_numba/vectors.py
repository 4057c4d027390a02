"""Vectors of 16 numbers as values in Numba code, for what its own vectorizer misses.

float16 is read as uint16 and bfloat16 as int16, for Numba has neither. No operation is relaxed:
each rounds as IEEE 754 says, so that codes come out bit for bit like those of the generic form.
Nothing checks bounds. Numba does not see that what it has cached depends on this file: after a
change here, remove ``__pycache__``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from kvcompress.arrays import FLOAT16_MAX
from kvcompress_numba.intrinsics import (
    F32,
    I16,
    I32,
    LANES,
    Memory,
    define_operator,
    floats,
    function,
    ints,
    octets,
)

define_operator(operator.add, floats, "fadd")
define_operator(operator.sub, floats, "fsub")
define_operator(operator.mul, floats, "fmul")
define_operator(operator.truediv, floats, "fdiv")
define_operator(operator.add, ints, "add")
define_operator(operator.or_, ints, "or_")
define_operator(operator.or_, octets, "or_")


@function(floats)
def load(builder: Any, memory: Memory, index: Any) -> Any:
    """16 numbers of a float32, uint16 (float16) or int16 (bfloat16) array, as float32."""
    return _widened(builder, memory, index, lambda element: ir.VectorType(element, LANES))


@function(types.float32)
def get(builder: Any, memory: Memory, index: Any) -> Any:
    """One number, like `load`."""
    return _widened(builder, memory, index, lambda element: element)


@function(types.void)
def store(builder: Any, memory: Memory, index: Any, value: Any) -> None:
    """Write one or 16 float32 numbers into such an array, rounded to nearest even."""
    _narrowed(builder, memory, index, value)


@function(types.void)
def narrow(builder: Any, memory: Memory, index: Any, value: Any) -> None:
    """`store` what `kvcompress.arrays.narrow` makes of one or 16 numbers."""
    if memory.dtype == types.uint16:
        value = _choose(builder, "<", value, _all(value, FLOAT16_MAX))
        value = _choose(builder, ">", value, _all(value, -FLOAT16_MAX))
    _narrowed(builder, memory, index, value)


@function(ints)
def load_ints(builder: Any, memory: Memory, index: Any) -> Any:
    """16 numbers of an int32 array."""
    return memory.read(builder, index, ints.ir)


@function(types.void)
def store_ints(builder: Any, memory: Memory, index: Any, value: Any) -> None:
    """Write 16 numbers into an int32 array."""
    memory.write(builder, index, value)


@function(octets)
def load_bytes(builder: Any, memory: Memory, index: Any) -> Any:
    """16 bytes of a uint8 array."""
    return memory.read(builder, index, octets.ir)


@function(types.void)
def store_bytes(builder: Any, memory: Memory, index: Any, value: Any) -> None:
    """Write 16 bytes into a uint8 array."""
    memory.write(builder, index, value)


@function(types.uint64)
def load_word(builder: Any, memory: Memory, index: Any) -> Any:
    """Eight bytes of a uint8 array as one number; the first of them is its lowest."""
    return memory.read(builder, index, ir.IntType(64))


@function(ints)
def load_codes(builder: Any, memory: Memory, index: Any) -> Any:
    """16 bytes of a uint8 array, as whole numbers."""
    return builder.zext(memory.read(builder, index, octets.ir), ints.ir)


@function(types.void)
def store_codes(builder: Any, memory: Memory, index: Any, value: Any) -> None:
    """Write the low bytes of 16 whole numbers."""
    memory.write(builder, index, builder.trunc(value, octets.ir))


@function(floats)
def splat(builder: Any, value: Any) -> Any:
    """16 times the same float32 number."""
    return _splat(builder, value)


@function(ints)
def splat_int(builder: Any, value: Any) -> Any:
    """16 times the same whole number."""
    return _splat(builder, builder.trunc(value, I32))


@function(floats)
def minimum(builder: Any, a: Any, b: Any) -> Any:
    """The smaller of each pair."""
    return _choose(builder, "<", a, b)


@function(floats)
def maximum(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each pair."""
    return _choose(builder, ">", a, b)


@function(types.float32)
def smallest(builder: Any, value: Any) -> Any:
    """The smallest of 16 numbers."""
    return _reduce(builder, value, lambda a, b: _choose(builder, "<", a, b))


@function(types.float32)
def largest(builder: Any, value: Any) -> Any:
    """The largest of 16 numbers."""
    return _reduce(builder, value, lambda a, b: _choose(builder, ">", a, b))


@function(types.int32)
def total(builder: Any, value: Any) -> Any:
    """Sum of 16 whole numbers."""
    return _reduce(builder, value, builder.add)


@function(ints)
def where_not_less(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """`x` where ``a >= b``, `y` elsewhere."""
    return builder.select(builder.fcmp_ordered(">=", a, b), x, y)


@function(floats)
def without_faint(builder: Any, value: Any, least: Any) -> Any:
    """16 numbers, with 0 for those of magnitudes below `least`."""
    size = _call(builder, "llvm.fabs.v16f32", value)
    return builder.select(builder.fcmp_ordered(">=", size, least), value, _all(value, 0.0))


@function(floats)
def absolute(builder: Any, value: Any) -> Any:
    """Magnitudes of 16 numbers."""
    return _call(builder, "llvm.fabs.v16f32", value)


@function(ints)
def rounded(builder: Any, value: Any) -> Any:
    """16 numbers below 2**31, rounded to whole ones, half to even."""
    return builder.fptosi(_call(builder, "llvm.rint.v16f32", value), ints.ir)


@function(ints)
def as_bits(builder: Any, value: Any) -> Any:
    """Bits of 16 numbers."""
    return builder.bitcast(value, ints.ir)


@function(floats)
def as_floats(builder: Any, value: Any) -> Any:
    """16 whole numbers, converted."""
    return builder.sitofp(value, floats.ir)


@function(lambda value, *places: value(value, *places))
def field(builder: Any, value: Any, right: Any, mask: Any, left: Any) -> Any:
    """``((value >> right) & mask) << left`` of 16 bytes or whole numbers."""
    right, mask, left = (
        _splat(builder, builder.trunc(places, value.type.element)) for places in (right, mask, left)
    )
    return builder.shl(builder.and_(builder.lshr(value, right), mask), left)


@function(ints)
def shift_left(builder: Any, value: Any, places: Any) -> Any:
    """``value << places`` of 16 whole numbers."""
    return builder.shl(value, _splat(builder, builder.trunc(places, I32)))


@function(lambda table, index: table(table, index))
def permuted(builder: Any, table: Any, index: Any) -> Any:
    """16 entries of a table of 16, float32 or whole, by the lowest 4 bits of their numbers."""
    index = builder.and_(index, _all(index, LANES - 1))
    # LLVM makes one instruction of this where there is one.
    value = ir.Constant(table.type, ir.Undefined)
    for lane in (ir.Constant(I32, i) for i in range(LANES)):
        entry = builder.extract_element(table, builder.extract_element(index, lane))
        value = builder.insert_element(value, entry, lane)
    return value


@function(floats)
def butterflies(builder: Any, value: Any) -> Any:
    """Sums and differences of neighbours, of neighbours but one, by 4 and by 8: four rounds."""
    for distance in (1, 2, 4, 8):
        swapped = _shuffle(builder, value, [i ^ distance for i in range(LANES)])
        signs = [1.0 if i & distance == 0 else -1.0 for i in range(LANES)]
        # Exact products: whether they are fused with the sums makes no difference.
        signs = ir.Constant(floats.ir, signs)
        value = _call(builder, "llvm.fmuladd.v16f32", value, signs, swapped)
    return value


def _widened(builder: Any, memory: Memory, index: Any, shape: Callable[[Any], Any]) -> Any:
    elements = {types.float32: F32, types.uint16: ir.HalfType(), types.int16: I16}
    value = memory.read(builder, index, shape(elements[memory.dtype]))
    if memory.dtype == types.uint16:
        return builder.fpext(value, shape(F32))
    if memory.dtype == types.int16:
        wide = builder.zext(value, shape(I32))
        return builder.bitcast(builder.shl(wide, _all(wide, 16)), shape(F32))
    return value


def _narrowed(builder: Any, memory: Memory, index: Any, value: Any) -> None:
    if memory.dtype == types.uint16:
        value = builder.fptrunc(value, _like(value, ir.HalfType()))
    elif memory.dtype == types.int16:
        bits = builder.bitcast(value, _like(value, I32))
        odd = builder.and_(builder.lshr(bits, _all(bits, 16)), _all(bits, 1))
        bits = builder.add(bits, builder.add(odd, _all(bits, 0x7FFF)))
        value = builder.trunc(builder.lshr(bits, _all(bits, 16)), _like(value, I16))
    memory.write(builder, index, value)


def _like(value: Any, element: ir.Type) -> ir.Type:
    """Type of so many elements as `value` has."""
    return ir.VectorType(element, LANES) if isinstance(value.type, ir.VectorType) else element


def _all(value: Any, number: float) -> ir.Constant:
    """Constant of the type of `value`."""
    vector = isinstance(value.type, ir.VectorType)
    return ir.Constant(value.type, [number] * LANES if vector else number)


def _choose(builder: Any, order: str, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(order, a, b), a, b)


def _shuffle(builder: Any, value: Any, lanes: list[int], other: Any = None) -> Any:
    index = ir.Constant(ints.ir, lanes)
    return builder.shuffle_vector(value, value if other is None else other, index)


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(vector, value, ir.Constant(I32, 0))
    return _shuffle(builder, first, [0] * LANES)


def _reduce(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        upper = [*range(lanes, 2 * lanes), *[0] * (LANES - lanes)]
        value = combine(value, _shuffle(builder, value, upper))
    return builder.extract_element(value, ir.Constant(I32, 0))


def _call(builder: Any, name: str, *values: Any) -> Any:
    kinds = [value.type for value in values]
    kind = ir.FunctionType(kinds[0], kinds)
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), values)
