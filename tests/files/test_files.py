"""Files of arrays and facts: round trips, damage, limits of JSON, and writes that fail."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import string
from pathlib import Path

import numpy as np
import pytest
from fuzz.container import DTYPES, File
from fuzz.formats import formats
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvcompress.arrays import digest
from kvcompress.errors import CalibrationError, FileError, KVCompressError
from kvcompress.files import format_of, load_arrays, save_arrays
from kvcompress.files.container import FACTS
from kvcompress.files.facts import CONTAINERS, DEPTH, DIGITS, parse_json

FORMATS = formats()
KINDS = [dtype for dtype in DTYPES.values() if dtype not in ("<i4", "|b1")]


@pytest.fixture(params=FORMATS)
def form(request):
    return FORMATS[request.param]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**127), 2**127)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(string.ascii_letters + ".", min_size=1, max_size=4),
        st.sampled_from(KINDS).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
        ),
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=3), values, max_size=3),
)
def test_what_is_saved_is_loaded(tmp_path_factory, arrays, facts):
    path = tmp_path_factory.mktemp("files") / "x"
    save_arrays(path, arrays, form="f.1", facts=facts)
    found, told = load_arrays(path, form="f.1")
    assert told == facts
    assert digest(found) == digest(arrays)
    assert format_of(path) == "f.1"


def test_safetensors_reads_and_writes_the_same_files(tmp_path):
    """Whoever has the package safetensors can look into our files."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    arrays = {"a": np.arange(5, dtype="u2"), "b": np.eye(3), "c": np.zeros((0, 2), "f2")}
    save_arrays(tmp_path / "x", arrays, form="f.1", facts={})
    found = load_file(tmp_path / "x")
    assert digest(found) == digest(arrays)
    with safe_open(tmp_path / "x", "numpy") as file:
        save_file(found, tmp_path / "y", file.metadata())
    assert digest(load_arrays(tmp_path / "y", form="f.1")[0]) == digest(arrays)


def test_formats_round_trip(form, tmp_path):
    """What is loaded is saved as it was, byte for byte."""
    for raw in form.files:
        (tmp_path / "x").write_bytes(raw)
        form.load(tmp_path / "x").save(tmp_path / "y")
        assert (tmp_path / "y").read_bytes() == raw


def refused(load, path, raw):
    path.write_bytes(raw)
    try:
        load(path)
    except CalibrationError:
        return True
    return False


def test_every_flipped_bit_of_a_small_file_is_found(tmp_path):
    path = tmp_path / "x"
    save_arrays(path, {"a": np.ones(2), "b": np.eye(2, dtype="f2")}, form="f.1", facts={"n": [1]})
    raw = path.read_bytes()
    for at in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[at // 8] ^= 1 << at % 8
        assert refused(lambda path: load_arrays(path, form="f.1"), path, flipped), at
    for length in range(len(raw)):
        assert refused(lambda path: load_arrays(path, form="f.1"), path, raw[:length]), length


def test_flipped_bits_and_truncations_of_formats_are_found(form, tmp_path):
    """A bit of every byte of the header, and of some of the data; the end missing."""
    raw, rng = min(form.files, key=len), np.random.default_rng(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(header), *rng.integers(header, len(raw), 400).tolist()]
    for at in places:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << int(rng.integers(8))
        assert refused(form.load, tmp_path / "x", flipped), at
    for length in (*range(0, len(raw), 61), len(raw) - 1):
        assert refused(form.load, tmp_path / "x", raw[:length]), length
    assert refused(form.load, tmp_path / "x", raw + b"\0")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "levels deep"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "levels deep"),
        ("9" * (DIGITS + 2), "digits"),
        ("-" + "9" * 5000, "digits"),
        ("[1e999]", "finite"),
        ("[NaN]", "finite"),
        ("-Infinity", "finite"),
        ('{"a": 1, "a": 1}', "twice"),
        ("[" + "[]," * CONTAINERS + "[]]", "objects"),
        ("{", "no JSON"),
        ("", "no JSON"),
        ("\ufeff{}", "no JSON"),
    ],
)
def test_json_has_limits(text, match):
    with pytest.raises(CalibrationError, match=match):
        parse_json(text)


@pytest.mark.parametrize("part", ["[],", "x", '\\"', "\\u0000", '{"a":0},', "0,"])
def test_json_takes_little_memory(part):
    """Of a text as long as facts may be; in a string, as in a header, and by itself."""
    import tracemalloc

    text = part * (FACTS // len(part))
    for whole in (f'[[[[[{"[" * DEPTH}"{text}"', json.dumps({"[" * 50: text}), f"[{text}0]"):
        tracemalloc.start()
        with contextlib.suppress(CalibrationError):
            parse_json(whole)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20


@given(values)
@example(["[" * 50, '"{' * 50, "\\"])
def test_json_within_limits_is_read(value):
    assert parse_json(json.dumps(value)) == value
    nested = json.dumps([value] * 40)  # brackets within strings do not count
    assert parse_json(nested) == [value] * 40


@pytest.mark.parametrize("facts", [{"a": np.nan}, {"a": {1}}, {"a": 10**50}, {"a": "x" * 2**20}])
def test_facts_that_could_not_be_read_are_not_written(facts, tmp_path):
    with pytest.raises(CalibrationError):
        save_arrays(tmp_path / "x", {}, form="f.1", facts=facts)
    assert not list(tmp_path.iterdir())


class Full:
    """A file on a disk that is full."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_the_old_file(step, old, form, tmp_path, monkeypatch):
    raw = form.files[0]
    (tmp_path / "x").write_bytes(raw)
    thing = form.load(tmp_path / "x")
    if not old:
        (tmp_path / "x").unlink()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(FileError, match=r"cannot write .*: No space left") as caught:
        thing.save(tmp_path / "x")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, KVCompressError)
    assert [x.name for x in tmp_path.iterdir()] == (["x"] if old else [])
    assert not old or (tmp_path / "x").read_bytes() == raw


def test_where_no_file_can_be_written(form, tmp_path):
    (tmp_path / "x").write_bytes(form.files[0])
    thing = form.load(tmp_path / "x")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("none/x", "x/y", "directory", "pipe", "a\0b"):
        with pytest.raises(FileError, match="cannot write"):
            thing.save(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["directory", "pipe", "x"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_what_is_read_only_stays(form, tmp_path):
    (tmp_path / "x").write_bytes(form.files[0])
    thing = form.load(tmp_path / "x")
    (tmp_path / "x").chmod(0o444)
    with pytest.raises(FileError, match="Permission denied"):
        thing.save(tmp_path / "x")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(FileError, match="Permission denied"):
            thing.save(tmp_path / "y")
    finally:
        tmp_path.chmod(0o755)
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


def test_where_no_file_can_be_read(form, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "", "pipe", "a\0b"):
        for load in (form.load, format_of):
            with pytest.raises(FileError, match="cannot read"):
                load(tmp_path / name)
    with pytest.raises(FileError) as caught:
        form.load(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT


def test_permissions_are_those_of_open(tmp_path):
    """Those of the umask, or those that the file has; a link leads to the same file."""
    old = os.umask(0o027)
    try:
        save_arrays(tmp_path / "x", {}, form="f.1", facts={})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    (tmp_path / "x").chmod(0o604)
    (tmp_path / "link").symlink_to("x")
    save_arrays(tmp_path / "link", {}, form="f.2", facts={})
    assert (tmp_path / "link").is_symlink()
    assert format_of(tmp_path / "x") == "f.2"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o604


def test_nothing_is_allocated_on_the_word_of_a_header(tmp_path):
    import tracemalloc

    save_arrays(tmp_path / "x", {"a": np.zeros(4, "u1")}, form="f.1", facts={})
    file = File.parse((tmp_path / "x").read_bytes())
    for shape in ([2**31], [2**40, 2**10], [2**62, 4], [0, 2**62]):
        file.arrays["a"][1] = shape
        file.seal()
        tracemalloc.start()
        assert refused(lambda path: load_arrays(path, form="f.1"), tmp_path / "y", file.write())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
