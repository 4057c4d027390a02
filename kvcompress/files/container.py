"""Files of arrays: safetensors, with a format, what JSON can hold, and a checksum of all that.

Written and read here rather than by the package ``safetensors``, which reads and writes the same
files: that one neither waits for the disk nor leaves permissions alone when it writes, and reads
names that are there twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.arrays import HostArray, digest
from kvcompress.errors import CalibrationError, FileError, KVCompressError
from kvcompress.files.facts import dump_json, parse_json, shown

HEADER = 1 << 24
"""Most bytes of the header: names, dtypes and shapes of the arrays, and the facts."""

FACTS = 1 << 20
"""Most characters of the facts."""

_METADATA = "__metadata__"

_BINARY = getattr(os, "O_BINARY", 0)  # of Windows

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "U16": "<u2",
    "I8": "<i1",
    "U8": "<u1",
}

_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def save_arrays(
    path: str | PathLike[str],
    arrays: Mapping[str, HostArray],
    *,
    form: str,
    facts: Mapping[str, Any],
) -> None:
    """Write a file, wholly or not at all: an older one of that name stays until it is complete.

    It has the permissions of the older file, or those that `open` would give it.

    Parameters
    ----------
    path : path
    arrays : mapping of str to array
    form : str
        Name and version of the format.
    facts : mapping
        Whatever JSON can hold.

    Raises
    ------
    FileError
        If the file cannot be written.
    CalibrationError
        If the facts cannot be written as JSON, or are more than a file may hold.
    """
    # Those of the widest numbers first: all are then aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    contiguous = {name: np.asarray(arrays[name], order="C") for name in names}
    header = _header(contiguous, form, dump_json(facts))
    try:
        target = Path(os.path.realpath(path))  # not the link, but what it leads to
        mode = _mode(target)
        part = target.with_name(f"{target.name}.{os.urandom(6).hex()}.part")
        with part.open("xb") as file:
            try:
                if mode is not None:
                    part.chmod(mode)
                file.write(header)
                for x in contiguous.values():
                    file.write(_bytes(x))
                file.flush()
                os.fsync(file.fileno())
                part.replace(target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except (OSError, ValueError) as error:  # a ValueError at a path with a null character
        raise _file_error("write", path, error) from error
    _sync_directory(target.parent)


def load_arrays(path: str | PathLike[str], *, form: str) -> tuple[dict[str, HostArray], Any]:
    """Read a file that `save_arrays` wrote.

    Nothing is allocated that the file does not hold: its size limits what its header can say.

    Parameters
    ----------
    path : path
    form : str
        The format that is expected.

    Returns
    -------
    arrays : dict of str to array
    facts
        What JSON held.

    Raises
    ------
    FileError
        If there is no such file, or it cannot be read.
    CalibrationError
        If it is not a file of that format, or is damaged.
    """
    with _open(path) as file:
        entries, metadata, size = _read_header(file)
        if metadata.get("format") != form:
            found = shown(metadata.get("format"))
            raise CalibrationError(f"its format is {found}, expected {form!r}")
        if set(metadata) != {"format", "facts", "sha256"}:
            raise CalibrationError("its metadata are not a format, facts and a checksum")
        text = metadata["facts"]
        if len(text) > FACTS:
            raise CalibrationError(f"facts may have {FACTS} characters, got {len(text)}")
        facts = parse_json(text)
        arrays = {name: _read(file, dtype, shape) for name, dtype, shape in _placed(entries, size)}
    if metadata["sha256"] != _checksum(arrays, form, text):
        raise CalibrationError("its checksum is not that of its contents")
    return arrays, facts


def format_of(path: str | PathLike[str]) -> str | None:
    """Return the format of a file that `save_arrays` wrote; None of any other file.

    Raises
    ------
    FileError
        If there is no such file, or it cannot be read.
    """
    try:
        with _open(path) as file:
            return _read_header(file)[1].get("format")
    except CalibrationError:
        return None


@contextlib.contextmanager
def reading(path: str | PathLike[str], kind: str) -> Iterator[None]:
    """Name the file, and what it should hold, in errors of what is read and checked within."""
    try:
        yield
    except FileError:
        raise
    except KVCompressError as error:
        raise CalibrationError(f"{path} is not {kind}, or damaged: {error}") from error


def flatten(groups: Mapping[Any, Mapping[str, HostArray]]) -> dict[str, HostArray]:
    """Name arrays in groups ``group.name``."""
    return {f"{group}.{name}": x for group, named in groups.items() for name, x in named.items()}


def unflatten(arrays: Mapping[str, HostArray]) -> dict[str, dict[str, HostArray]]:
    """Undo `flatten`; groups are strings."""
    groups: dict[str, dict[str, HostArray]] = {}
    for name, x in arrays.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = x
    return groups


def _header(arrays: Mapping[str, HostArray], form: str, text: str) -> bytes:
    if len(text) > FACTS:
        raise CalibrationError(f"facts may have {FACTS} characters, got {len(text)}")
    metadata = {"format": form, "facts": text, "sha256": _checksum(arrays, form, text)}
    entries: dict[str, Any] = {_METADATA: metadata}
    end = 0
    for name, x in arrays.items():
        start, end = end, end + x.nbytes
        entries[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    header = dump_json(entries).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > HEADER:
        raise CalibrationError(f"headers may have {HEADER} bytes, got {len(header)}")
    return struct.pack("<Q", len(header)) + header


def _checksum(arrays: Mapping[str, HostArray], form: str, text: str) -> str:
    """SHA-256 over format, facts, and names, dtypes, shapes and values of all arrays."""
    sha = hashlib.sha256()
    for part in (form, text, digest(arrays)):
        sha.update(f"{len(part)} ".encode() + part.encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


@contextlib.contextmanager
def _open(path: str | PathLike[str]) -> Iterator[BufferedReader]:
    try:
        # Opened without waiting for who would write into a pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        file = open(descriptor, "rb")  # noqa: PTH123, SIM115 - of a descriptor, closed below
    except (OSError, ValueError) as error:
        raise _file_error("read", path, error) from error
    with file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"cannot read {path}: it is not a regular file")
        try:
            yield file
        except OSError as error:
            raise _file_error("read", path, error) from error


def _read_header(file: BufferedReader) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries of the arrays, metadata, and the number of bytes that follow."""
    size = os.fstat(file.fileno()).st_size
    lead = file.read(8)
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
    if not 2 <= length <= min(size - 8, HEADER):
        raise CalibrationError(f"its header would have {length} bytes, of {size} in the file")
    raw = file.read(length)
    try:
        entries = parse_json(raw.decode())
    except UnicodeDecodeError as error:
        raise CalibrationError(f"its header is no text: {error.reason}") from error
    metadata = entries.pop(_METADATA, None) if isinstance(entries, dict) else None
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise CalibrationError("its metadata are not strings by name")
    return entries, metadata, size - 8 - length


def _placed(entries: dict[str, Any], size: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of arrays, in order, which are all that the file holds."""
    placed = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CalibrationError(f"the header of array {shown(name)} is {shown(entry)}")
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CalibrationError(
                f"array {shown(name)} must be one of {', '.join(_DTYPES)}, got {shown(dtype)}"
            )
        # NumPy multiplies sizes of empty arrays, too.
        if not _sizes(shape) or len(shape) > 8 or math.prod(n or 1 for n in shape) >= 1 << 59:
            raise CalibrationError(f"array {shown(name)} has the shape {shown(shape)}")
        if not _sizes(place) or len(place) != 2:
            raise CalibrationError(f"array {shown(name)} is at {shown(place)}")
        if place[1] - place[0] != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise CalibrationError(f"array {shown(name)} is at {place}, which is not its size")
        placed.append((place, name, _DTYPES[dtype], tuple(shape)))
    placed.sort()
    end = 0
    for place, name, _, _ in placed:
        if place[0] != end:
            raise CalibrationError(f"array {shown(name)} is at {place}, expected at {end}")
        end = place[1]
    if end != size:
        raise CalibrationError(f"its arrays have {end} bytes, the file holds {size}")
    return [(name, dtype, shape) for _, name, dtype, shape in placed]


def _sizes(values: Any) -> bool:
    """Whether this is a list of integers that a file can be large."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 59 for n in values)


def _read(file: BufferedReader, dtype: str, shape: tuple[int, ...]) -> HostArray:
    x = np.empty(shape, dtype)
    if file.readinto(_bytes(x)) != x.nbytes:
        raise CalibrationError("the file ended while it was read")
    return x


def _bytes(x: HostArray) -> memoryview:
    """Return the memory of a contiguous array."""
    whole: Any = x.reshape(-1).view(np.uint8)
    return memoryview(whole)


def _mode(target: Path) -> int | None:
    """Permissions of a file that is to be replaced; None if there is none."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError("it is not a regular file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(mode)


def _sync_directory(directory: Path) -> None:
    """Wait until the disk knows the new name, where it can tell."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _file_error(verb: str, path: Any, error: OSError | ValueError) -> FileError:
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    return FileError(number, f"cannot {verb} {path}: {reason or error}")
