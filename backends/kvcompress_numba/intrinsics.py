"""How Numba is taught vectors of 16 numbers, and functions of them that build LLVM instructions.

Numba does not see that what it has cached depends on this file: after a change here, remove
``__pycache__``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_builtin, register_model, type_callable
from numba.np.arrayobj import make_array

LANES = 16

F32, I8, I16, I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)


class Vector(types.Type):  # type: ignore[misc]  # Numba has no types
    """Numba's type of a vector of `LANES` elements."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(f"{name}x{LANES}")
        self.ir = ir.VectorType(element, LANES)


@register_model(Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]  # Numba has no types
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ir)


floats, ints, octets = Vector("float32", F32), Vector("int32", I32), Vector("uint8", I8)


class Memory:
    """An array as functions for kernels see it: elements of one or 16 numbers, in any place."""

    def __init__(self, data: Any, dtype: Any) -> None:
        self.data, self.dtype = data, dtype

    def read(self, builder: Any, index: Any, shape: Any) -> Any:
        """Load a value of an LLVM type."""
        return builder.load(self._pointer(builder, index, shape), align=self._align)

    def write(self, builder: Any, index: Any, value: Any) -> None:
        """Store a value."""
        builder.store(value, self._pointer(builder, index, value.type), align=self._align)

    def _pointer(self, builder: Any, index: Any, shape: Any) -> Any:
        place = builder.gep(self.data, [index], inbounds=True)
        return builder.bitcast(place, shape.as_pointer())

    @property
    def _align(self) -> int:
        return int(self.dtype.bitwidth) // 8


def function(result: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function for kernels of one that builds its instructions."""

    def decorate(build: Callable[..., Any]) -> Any:
        def typing(_: Any, *arguments: Any) -> Any:
            def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                operands = [
                    Memory(make_array(kind)(context, builder, value).data, kind.dtype)
                    if isinstance(kind, types.Array)
                    else value
                    for kind, value in zip(signature.args, values, strict=True)
                ]
                value = build(builder, *operands)
                return context.get_dummy_value() if value is None else value

            kinds = map(types.unliteral, arguments)
            return result(*kinds), lower

        # Numba goes by the signature: a context, here a builder, and what the kernel passes.
        return intrinsic(update_wrapper(typing, build))

    return decorate


def define_operator(symbol: Callable[..., Any], vector: Vector, instruction: str) -> None:
    """Make an operator of Python, between two vectors of a type, an LLVM instruction."""

    def typing(_: Any) -> Any:
        return lambda a, b: vector if a == b == vector else None

    def lower(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return getattr(builder, instruction)(*values)

    type_callable(symbol)(typing)
    lower_builtin(symbol, vector, vector)(lower)
