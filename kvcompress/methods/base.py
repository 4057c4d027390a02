"""What every compression method is: frozen settings with encode, decode and known sizes."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias

from kvcompress.arrays import Array, array_namespace, dtype_name, is_concrete, itemsize
from kvcompress.backend import Dispatcher
from kvcompress.errors import PayloadError, SettingError
from kvcompress.methods.registry import known, register
from kvcompress.rope import RoPE

Role: TypeAlias = Literal["keys", "values"]
Payload: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an array that need not exist yet.

    Parameters
    ----------
    shape : tuple of int
    dtype : str
        "float16", "bfloat16", "float32", "uint8" or "int32".
    below : int, optional
        Of whole numbers: what all of them are below, such as the length of what they index. It
        is checked before a payload is decoded, and not compared.
    """

    shape: tuple[int, ...]
    dtype: str
    below: int | None = dataclasses.field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * itemsize(self.dtype)

    def check(self, name: str, x: Array) -> None:
        """Check that an array is what is specified; its numbers as far as they can be looked at.

        Raises
        ------
        PayloadError
        """
        shape, dtype = tuple(x.shape), dtype_name(x.dtype)
        if (shape, dtype) != (self.shape, self.dtype):
            raise PayloadError(
                f"{name} must be {self.dtype} of shape {self.shape}, got {dtype} of shape {shape}"
            )
        if self.below is not None and self.size and is_concrete(x):
            xp = array_namespace(x)
            low, high = int(xp.min(x)), int(xp.max(x))
            if low < 0 or high >= self.below:
                raise PayloadError(
                    f"{name} must be from 0 to {self.below - 1}, got {low} to {high}"
                )


@dataclass(frozen=True)
class Method(ABC):
    """A compression method: immutable, hashable settings; a new method is a new subclass.

    A method sees one tensor ``[heads, tokens, head_dim]`` and whether it holds keys or values,
    never a batch, a cache or a file. It turns the tensor into a payload: named arrays whose shapes
    follow from the settings and the tensor's shape alone.

    A subclass that sets `identifier` is registered: `from_dict` finds it, and the commands, plots
    and tests that list methods take it from there.
    """

    identifier: ClassVar[str]
    """What names the method in JSON and in files, for ever; the class may be renamed."""

    by_operations: ClassVar[bool] = False
    """Whether `encode` only asks `x` for shape, dtype and library, and hands it to operations."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "identifier" in cls.__dict__:
            register(cls)

    @classmethod
    def presets(cls, head_dims: Collection[int], /) -> tuple[Self, ...]:
        """Return settings that fit tensors of all these `head_dims`, from few bits to many.

        They are what ``kvcompress compare``, ``bench`` and ``doctor`` run, and what the tests check
        every method with. A method without presets is not listed there.
        """
        return ()

    @classmethod
    def at_bits(cls, bits: float, /) -> Self | None:
        """Return the settings whose codes take `bits` per value; None if there are none.

        They are what ``kvcompress evaluate`` runs. Scales, gains and bases may come on top.
        """
        return None

    @property
    def rope(self) -> RoPE | None:
        """The rotary embedding that keys are to be given without, if any.

        Who calls `encode` undoes it of the keys first, and does it again of what `decode` returns,
        at the same positions.
        """
        return None

    @abstractmethod
    def encoded_spec(self, spec: TensorSpec, role: Role) -> Mapping[str, TensorSpec]:
        """Name, shape and dtype of every array of the payload, before anything is encoded.

        Raises
        ------
        SettingError
            If the settings do not fit a tensor of this shape.
        """

    @abstractmethod
    def encode(self, x: Array, role: Role, dispatch: Dispatcher) -> Payload:
        """Compress ``x [heads, tokens, head_dim]``; keys without `rope`."""

    @abstractmethod
    def decode(self, payload: Payload, spec: TensorSpec, role: Role, dispatch: Dispatcher) -> Array:
        """Restore the tensor of shape `spec.shape`, in float32 or in its dtype; see `rope`."""

    def bind(self, quant_bits: int) -> Self:
        """Fill in the compressor's `quant_bits` where the settings leave them open."""
        return self

    def detach(self) -> Self:
        """Return the settings as what is compressed carries them: small, and serializable."""
        return self

    def attach(self, method: Method | None) -> Self:
        """Undo `detach`, by the method of the compressor that is asked to decompress.

        Raises
        ------
        CalibrationError
            If what `detach` left out is not to be had from `method`.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON can carry; `from_dict` undoes it."""
        return {"method": self.identifier, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> Method:
        """Build the method that `to_dict` described.

        Raises
        ------
        SettingError
            If the method or one of its settings is unknown.
        """
        values = dict(settings)
        name, methods = values.pop("method", None), known_methods()
        if not isinstance(name, str) or name not in methods:
            raise SettingError(f"unknown method {name!r}; known: {', '.join(sorted(methods))}")
        try:
            return methods[name](**values)
        except TypeError as error:
            raise SettingError(f"the settings of {name} do not fit: {error}") from error


def known_methods() -> dict[str, type[Method]]:
    """Return every registered `Method` by its identifier, those of entry points included."""
    return known(Method)
