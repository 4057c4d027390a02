"""What derives from the registry of operations."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from kvcompress import KVCacheCompressor, LowRank, ops
from kvcompress.backend import Dispatcher, KernelBackend, select, takes
from kvcompress.cli import bench
from kvcompress.cli.libraries import LIBRARIES
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import (
    OPERATIONS,
    methods,
    operation,
)
from kvcompress.ops.slots import Paged
from kvcompress.testing import conformance, gpu_calls


@pytest.fixture
def toy():
    """An operation that is there for the time of one test."""
    before = dict(OPERATIONS)

    def examples(inputs: Inputs):
        for factor in inputs.choose(every=(1.0, 2.0, 3.0), usual=(2.0,)):
            yield Call((inputs.tensor(extreme=False),), {"factor": factor}, f"by {factor}")

    @operation(examples, dtypes=("float32",), paged=True)
    def scale(x, *, factor):
        """Multiply by a factor."""
        return x * factor

    yield scale
    OPERATIONS.clear()
    OPERATIONS.update(before)


class Doubling(KernelBackend):
    name = "doubling"

    def available(self):
        return True

    def usable(self, *arrays):
        return all(type(x) is np.ndarray for x in arrays)

    @takes(lambda *_, factor: factor == 2)
    def scale(self, x, *, factor):
        return x + x

    @takes(lambda *_, factor: factor == 2)
    def scale_paged(self, pool, slots, *, factor):
        self.in_place = True
        return ops.gather_slots(pool + pool, slots)


def test_a_new_operation_is_part_of_all_that_derives_from_them(toy, tables):
    cases = [case for case in conformance.cases() if case.operation.function is toy]
    assert len(cases) == 6 * 3 * 2
    assert {case.op for case in cases} == {"scale", "scale_paged"}
    library = LIBRARIES["numpy"]()
    timed = [op.name for op, _ in bench._operations((1, 2, 8, 16), "float16", library)]
    assert "scale" in timed
    assert set(timed) == OPERATIONS.keys()
    on_gpu = [str(call) for call in gpu_calls.calls(np.asarray, (2, 32, 8), Doubling())]
    assert on_gpu == ["scale by 2.0 float32", "scale_paged by 2.0 float32"]
    row = "| `scale`, `scale_paged` | Multiply by a factor | bit for bit |"
    assert row in tables.operations_table()
    assert {"scale", "scale_paged"} <= methods().keys()
    pytest.importorskip("torch")
    torch_backend = pytest.importorskip("kvcompress_torch").backend
    assert callable(torch_backend.scale)
    assert callable(torch_backend.scale_paged)


def test_a_new_operation_is_handed_to_a_backend(toy):
    backend = Doubling()
    dispatch, x = Dispatcher((backend,)), np.full((2, 3, 4), 3.0, "float32")
    assert dispatch.backend_for("scale", x, factor=2) is backend
    assert dispatch.backend_for("scale", x, factor=3) is None
    assert dispatch.backend_for("scale", [3.0], factor=2) is None
    np.testing.assert_array_equal(dispatch(toy, x, factor=2), 6 * np.ones_like(x))
    np.testing.assert_array_equal(dispatch(toy, x, factor=3), 9 * np.ones_like(x))
    pool, slots = Inputs((2, 3, 4), "float32").paged(x)
    np.testing.assert_array_equal(dispatch(toy, Paged(pool, slots), factor=2), 2 * x)
    assert backend.in_place
    assert conformance.check_backend(backend) == {"scale": 6, "scale_paged": 6}


def test_it_is_gone_again():
    assert "scale" not in OPERATIONS
    with pytest.raises(AttributeError, match="has no operation 'scale'"):
        _ = pytest.importorskip("kvcompress_torch").backend.scale


@pytest.mark.parametrize("op", OPERATIONS.values(), ids=lambda op: op.name)
def test_examples(op):
    """There are some for every dtype and level, and they are the same each time."""
    assert op.function is getattr(ops, op.name)
    assert op.summary.endswith(".")
    for dtype, level in itertools.product(op.dtypes, ("every", "usual", "typical")):
        first, second = (
            list(op.examples(Inputs((2, 9, 8), dtype, level, seed=3))) for _ in range(2)
        )
        assert first
        for a, b in zip(first, second, strict=True):
            assert a.static == b.static
            for x, y in zip(a.arrays, b.arrays, strict=True):
                np.testing.assert_array_equal(x, y, strict=True)
            assert all(not np.shape(value) for value in a.static.values())


def test_a_backend_may_say_nothing():
    class Everything(KernelBackend):
        name = "everything"

        def cast(self, x, *, dtype):
            return x

    assert Everything().supports("cast", np.ones(3), dtype="float16")


def test_what_is_inherited_keeps_what_it_takes():
    class Halving(Doubling):
        def scale(self, x, *, factor):
            return x / 2

    assert Halving().supports("scale_paged", np.ones(3), np.ones(3), factor=2)
    assert not Halving().supports("scale_paged", np.ones(3), np.ones(3), factor=3)
    assert Halving().supports("scale", np.ones(3), factor=3)


def test_a_compressor_takes_a_dispatcher():
    called = []

    class Counting(Dispatcher):
        def __call__(self, op, *arrays, **static):
            called.append(op.__name__)
            return super().__call__(op, *arrays, **static)

    compressor = KVCacheCompressor(LowRank(2), backend=Counting())
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 4)).astype("float32")
    plain = KVCacheCompressor(LowRank(2), backend="generic")
    expected = plain.decompress_kv(plain.compress_kv(x, x))
    np.testing.assert_array_equal(compressor.decompress_kv(compressor.compress_kv(x, x)), expected)
    assert {"within", "cast"} <= set(called)


def test_a_dispatcher_is_chosen_compared_and_hashed_as_it_is():
    chosen = select()
    assert select(chosen) is chosen
    assert Dispatcher() == Dispatcher()
    a, b = (KVCacheCompressor(LowRank(2), backend=select()) for _ in range(2))
    assert (a, hash(a)) == (b, hash(b))
    assert a != KVCacheCompressor(LowRank(2), backend=Dispatcher((Doubling(),)))


@pytest.mark.parametrize(
    "choice",
    [None, "auto", "generic", Dispatcher(), select()],
    ids=["default", "auto", "generic", "no backends", "all backends"],
)
def test_pickled(choice):
    """Our own backends go by name, so that what comes back is equal."""
    compressor = KVCacheCompressor(LowRank(2), backend=choice)
    again = pickle.loads(pickle.dumps(compressor))
    assert (again, hash(again)) == (compressor, hash(compressor))


def test_a_dispatcher_with_a_backend_that_cannot_be_pickled():
    class Local:
        name = "local"

    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(KVCacheCompressor(LowRank(2), backend=Dispatcher((Local(),))))
