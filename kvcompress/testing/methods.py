"""What a method must do, whatever it codes: `check_method` for the tests of a method.

In the tests of a method::

    @pytest.mark.parametrize("method", MyMethod.presets([64]), ids=str)
    def test_conforms(method):
        check_method(method, head_dim=64)
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcompress.arrays import (
    FLOAT16_MAX,
    FLOATING,
    Array,
    array_namespace,
    device,
    dtype_name,
    dtype_of,
    namespace_of,
    to_host,
)
from kvcompress.backend import Dispatcher
from kvcompress.compressor import KVCacheCompressor
from kvcompress.compressor.validation import LARGEST
from kvcompress.methods import Method

SHAPES = ((1, 2, 0), (0, 2, 5), (1, 1, 1), (1, 3, 7), (2, 2, 65))
"""Batch, heads and tokens of the tensors: empty ones, a single token, and more."""


def check_method(
    method: Method, *, head_dim: int, asarray: Callable[[Any], Array] = np.asarray
) -> int:
    """Check a method on keys and values of all dtypes, empty, degenerate and extreme ones too.

    Its settings go through JSON and pickle; the payload is what `Method.encoded_spec` says, and the
    size what `estimate_size` says; what is restored has the shape, dtype, library and device of
    what was compressed, and is finite; the same input gives the same bytes; arguments stay as they
    were. How close the result is, a test of the method itself must say.

    Parameters
    ----------
    method : Method
        Any settings that fit `head_dim`.
    head_dim : int
    asarray : callable
        Copies a NumPy array (bfloat16 as that of ``ml_dtypes``) into a library, on a device.
        Raises TypeError where the library lacks the dtype.

    Returns
    -------
    int
        How many pairs of keys and values were compressed.

    Raises
    ------
    AssertionError
        If one of these does not hold.
    """
    settings = json.loads(json.dumps(method.detach().to_dict()))
    _equal(Method.from_dict(settings), method.detach(), "what JSON gives back")
    _equal(pickle.loads(pickle.dumps(method)), method, "what pickle gives back")
    _equal(hash(pickle.loads(pickle.dumps(method))), hash(method), "its hash")
    compressor, count = KVCacheCompressor(method, sinks=1, window=1), 0
    for x in tensors(head_dim):
        try:
            k, v = asarray(x.copy()), asarray(x[..., ::-1].copy())
        except TypeError:
            continue
        _check_pair(compressor, k, v)
        count += 1
    return count


def tensors(head_dim: int) -> Iterator[np.ndarray[Any, Any]]:
    """Draw tensors ``[batch, heads, tokens, head_dim]`` of all dtypes: ordinary and degenerate."""
    for seed, (batch, heads, tokens) in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        shape = (batch, heads, tokens, head_dim)
        normal = rng.standard_normal(shape)
        token = rng.standard_normal((batch, heads, 1, head_dim))
        low_rank = rng.standard_normal((batch, heads, tokens, 1)) * token
        constant = np.broadcast_to(token, shape)
        outlier = normal * np.where(np.arange(head_dim) == head_dim // 2, 100.0, 1.0) + 50.0
        for dtype in FLOATING:
            kind = dtype_of(namespace_of(np), dtype)
            largest = FLOAT16_MAX if dtype == "float16" else LARGEST
            for x in (normal, low_rank, constant, outlier, normal * 0, normal * 2.0**-130):
                yield x.astype(kind)
            yield np.clip(normal * largest, -largest, largest).astype(kind)


def _check_pair(compressor: KVCacheCompressor, k: Array, v: Array) -> None:
    known = compressor.layer_codec(Dispatcher()).keys
    before = [to_host(x).tobytes() for x in (k, v)]
    compressed = compressor.compress_kv(k, v)
    for tensor in (compressed.keys, compressed.values):
        method = tensor.method.attach(known)
        spec = method.encoded_spec(tensor.spec, tensor.role)
        found = {name: (tuple(a.shape), dtype_name(a.dtype)) for name, a in tensor.payload.items()}
        _equal(found, {name: (s.shape, s.dtype) for name, s in spec.items()}, "the payload")
    size = compressor.estimate_size(tuple(k.shape), tuple(v.shape), dtype=dtype_name(k.dtype))
    _equal(compressed.nbytes, size, "the size")
    again = compressor.compress_kv(k, v)
    for one, other in ((compressed.keys, again.keys), (compressed.values, again.values)):
        for name, a in one.payload.items():
            _equal(to_host(a).tobytes(), to_host(other.payload[name]).tobytes(), f"{name}, again")
    for x, y in zip((k, v), compressor.decompress_kv(compressed), strict=True):
        where = [(array_namespace(a).__name__, device(a), dtype_name(a.dtype)) for a in (x, y)]
        _equal(where[1], where[0], "library, device and dtype")
        _equal(tuple(y.shape), tuple(x.shape), "the shape")
        finite = np.isfinite(to_host(y).astype(np.float64))
        _equal(bool(np.all(finite)), True, f"that all is finite for {tuple(x.shape)} {x.dtype}")
    _equal([to_host(x).tobytes() for x in (k, v)], before, "the arguments, afterwards")


def _equal(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: found {found!r}, expected {expected!r}")
