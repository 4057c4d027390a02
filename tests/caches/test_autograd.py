"""Caches of PyTorch record no gradients, and may be used inside and outside of inference mode."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from cache_kinds import KINDS, Kind

from kvcompress import KVCacheCompressor, LowRank, MlaCompressedKVCache
from kvcompress.arrays import detach

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.library("torch")
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


class Torch:
    name, module, asarray = "torch", torch, staticmethod(torch.asarray)

    @staticmethod
    def numpy(x: Any) -> Any:
        return x.detach().numpy().copy()


def modes(inference: bool) -> Any:
    return torch.inference_mode() if inference else nullcontext()


def graph_depth(x: Any) -> int:
    node, depth = x.grad_fn, 0
    while node is not None:
        node = node.next_functions[0][0] if node.next_functions else None
        depth += 1
    return depth


@all_kinds
def test_appended_tokens_leave_their_gradients(kind: Kind) -> None:
    cache = kind.make(Torch, num_blocks=20)
    cache.allocate_sequence("a")
    w = torch.ones((), requires_grad=True)
    rows = []
    for token in range(20):
        arrays = [torch.asarray(x) * w for x in kind.inputs(0, [token])]
        kind.add(cache, 0, "a", *arrays)
        rows.append(kind.row(0, token, token))
    held = kind.held(cache, 0, "a")
    cache.fork("a", "b")
    kind.add_held(cache, 0, "b", *(x * w for x in held))
    for pools in (cache._keys, cache._values):
        for pool in pools.arrays:
            assert not pool.requires_grad
            assert graph_depth(pool) == 0
    kind.check_restored(Torch, cache.get_kv(0, "a"), 0, rows)
    assert all(x.requires_grad for x in arrays)  # the caller's are as they were
    assert not any(x.requires_grad for x in (*held, *cache.get_kv(0, "a")))


@all_kinds
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("copied", [None, False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_inference_mode(
    kind: Kind, made: bool, written: bool, copied: bool | None, grad: bool
) -> None:
    compressor = KVCacheCompressor(LowRank(1))
    with modes(made):
        cache = kind.make(Torch, num_blocks=12)
        cache.allocate_sequence("a")
        rows = kind.append(Torch, cache, 0, "a", list(range(6)))
    with modes(bool(copied)):
        cache = cache if copied is None else copy.deepcopy(cache)
    with modes(written):
        arrays = [torch.asarray(x).requires_grad_(grad) for x in kind.inputs(0, [6, 7])]
    for mode in (written, not written):  # tokens of one mode written in both
        start = cache.seq_len(0, "a")
        with modes(mode):
            kind.add(cache, 0, "a", *arrays)
            rows += [kind.row(0, t, start + i) for i, t in enumerate([6, 7])]
            name = cache.fork("a")
            rows_of_fork = rows + kind.append(Torch, cache, 0, name, [9])  # copies a block
            kind.check_held(Torch, cache, 0, name, rows_of_fork)
            cache.free_sequence(name)
    for mode in (False, True):
        with modes(mode):
            kind.check_held(Torch, cache, 0, "a", rows)
            kind.check_restored(Torch, cache.get_kv(0, "a"), 0, rows)
            list(cache.iter_kv_blocks(0, "a"))
            compressed = compressor.compress_paged_cache(cache, 0, "a")
            assert compressed.keys.spec.shape[1] == len(rows)


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_projections_that_are_trained(kind: Kind) -> None:
    """As those of a model, which are slices of its parameters."""
    layers = [
        dataclasses.replace(
            layer,
            **{
                field.name: getattr(layer, field.name).requires_grad_() * 1
                for field in dataclasses.fields(layer)
                if torch.is_tensor(getattr(layer, field.name))
            },
        )
        for layer in kind.make(Torch).layers
    ]
    cache = MlaCompressedKVCache(layers, 4)
    cache.allocate_sequence("a")
    rows = kind.append(Torch, cache, 0, "a", [0, 1, 2])
    k, v = copy.deepcopy(cache).get_kv(0, "a")
    assert not any(x.requires_grad for x in (k, v))
    kind.check_restored(Torch, (k, v), 0, rows)


def test_detach() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not detach(x * 2).requires_grad
    assert detach(x).data_ptr() == x.data_ptr()
    host = np.ones(2)
    assert detach(host) is host
