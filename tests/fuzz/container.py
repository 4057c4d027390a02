"""Files of safetensors taken apart, changed at will, and put together with a fresh checksum."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field

import numpy as np

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U16": "<u2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "|b1",
}


@dataclass
class File:
    """What a file says: arrays as ``[dtype, shape, bytes]``, metadata, and oddities of its header.

    `overrides` replaces entries of the header when it is written; `lead` its length; `repeated`
    are names that are written twice; `tail` follows the data; `cut` bytes at the end are left out.
    """

    arrays: dict[str, list]
    metadata: dict[str, object]
    overrides: dict[str, object] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    lead: int | None = None
    tail: bytes = b""
    cut: int = 0

    @classmethod
    def parse(cls, raw: bytes) -> File:
        length = struct.unpack("<Q", raw[:8])[0]
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        metadata = header.pop("__metadata__")
        arrays = {
            name: [x["dtype"], x["shape"], data[slice(*x["data_offsets"])]]
            for name, x in header.items()
        }
        return cls(arrays, metadata)

    @property
    def text(self) -> str:
        """The facts, as JSON."""
        return str(self.metadata.get("facts"))

    @text.setter
    def text(self, text: str) -> None:
        self.metadata["facts"] = text

    @property
    def facts(self):
        return json.loads(self.text)

    def array(self, name: str) -> np.ndarray:
        """A copy of an array."""
        dtype, shape, data = self.arrays[name]
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy()

    def put(self, name: str, x: np.ndarray) -> None:
        """Replace or add an array."""
        dtype = next(key for key, value in DTYPES.items() if np.dtype(value) == x.dtype)
        self.arrays[name] = [dtype, list(x.shape), x.tobytes()]

    def seal(self) -> None:
        """Compute the checksum that the file says of itself."""
        sha = hashlib.sha256()
        for name, (dtype, shape, data) in sorted(self.arrays.items()):
            form = np.dtype(DTYPES[dtype]).str if dtype in DTYPES else dtype
            sha.update(
                f"{name} {form} {tuple(shape) if isinstance(shape, list) else shape}".encode()
            )
            sha.update(data)
        whole = hashlib.sha256()
        for part in (str(self.metadata.get("format")), self.text, sha.hexdigest()):
            whole.update(f"{len(part)} ".encode() + part.encode("utf-8", "surrogatepass"))
        self.metadata["sha256"] = whole.hexdigest()

    def write(self) -> bytes:
        entries, end = [("__metadata__", self.metadata)], 0
        for name, (dtype, shape, data) in self.arrays.items():
            place = [end, end + len(data)]
            entry = {"dtype": dtype, "shape": shape, "data_offsets": place}
            entries += [(name, entry)] * (1 + (name in self.repeated))
            end += len(data)
        text = ",".join(
            f"{json.dumps(name)}:{json.dumps(self.overrides.get(name, entry))}"
            for name, entry in entries
        )
        header = f"{{{text}}}".encode()
        header += b" " * (-len(header) % 8)
        length = len(header) if self.lead is None else self.lead
        data = b"".join(data for _, _, data in self.arrays.values())
        raw = struct.pack("<Q", length % 2**64) + header + data + self.tail
        return raw[: len(raw) - self.cut]
