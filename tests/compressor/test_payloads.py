"""What arrives from elsewhere is compared with what it claims to be, before a kernel sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import KVCacheCompressor, TensorSpec, VectorQuantization
from kvcompress.cli.presets import presets
from kvcompress.errors import KVCompressError, PayloadError

DIM, TOKENS = 8, 70
METHODS = [known[0] for known in presets([DIM]).values()]


def compressed(xp, method, **options):
    x = np.random.default_rng(0).standard_normal((1, 2, TOKENS, DIM)).astype("float32")
    compressor = KVCacheCompressor(method, **options)
    return compressor, compressor.compress_kv(xp.asarray(x), xp.asarray(x))


def changes(array):
    """Arrays of other shapes and dtypes than `array`."""
    yield array[:1] if array.shape[0] > 1 else array[..., :0]
    yield array[..., : array.shape[-1] // 2]
    yield np.concatenate([array, array])
    yield array.reshape(-1)
    yield array.astype("float64" if array.dtype.kind == "f" else "int64")
    yield array.reshape(-1)[:1]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_other_shapes_and_dtypes(xp, method):
    if xp.is_jax:
        pytest.skip("the check looks at shapes alone, which are the same there")
    compressor, z = compressed(xp, method, sinks=2)
    for role in ("keys", "values"):
        tensor = getattr(z, role)
        for name, array in {**tensor.payload, "exact": tensor.exact}.items():
            for y in changes(xp.numpy(array)):
                if y.shape == array.shape and y.dtype == xp.numpy(array).dtype:
                    continue
                try:
                    y = xp.asarray(y)
                except (TypeError, ValueError):
                    continue
                damaged = (
                    replace(tensor, exact=y)
                    if name == "exact"
                    else replace(tensor, payload={**tensor.payload, name: y})
                )
                damaged = replace(z, **{role: damaged})
                with pytest.raises(KVCompressError):
                    compressor.decompress_kv(damaged)
        for payload in ({}, dict(list(tensor.payload.items())[1:]), {**tensor.payload, "x": y}):
            with pytest.raises(PayloadError, match="expected the arrays"):
                compressor.decompress_kv(replace(z, **{role: replace(tensor, payload=payload)}))


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(data=st.data())
def test_any_bytes(method, data):
    """Arrays of the right shape that hold anything: finite or not, but no crash, no raw error."""
    compressor, z = compressed(NumPy, method, sinks=1)
    payload = {}
    for name, array in z.keys.payload.items():
        raw = data.draw(st.sampled_from((0, 255, None)))
        fill = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, array.nbytes)
        raw = fill.astype("uint8") if raw is None else np.full(array.nbytes, raw, "uint8")
        payload[name] = raw.view(array.dtype).reshape(array.shape)
    try:
        with np.errstate(all="ignore"):
            k, _ = compressor.decompress_kv(replace(z, keys=replace(z.keys, payload=payload)))
        assert k.shape == (1, 2, TOKENS, DIM)
    except KVCompressError:
        pass


class NumPy:
    asarray = staticmethod(np.asarray)


def test_claims_of_gigabytes_are_refused(xp):
    compressor, z = compressed(xp, METHODS[0])
    for shape in ((2, 2**40, DIM), (2**40, TOKENS, DIM), (2, TOKENS, 2**40), (2, TOKENS - 1, DIM)):
        damaged = replace(z.keys, spec=TensorSpec(shape, "float32"))
        with pytest.raises(KVCompressError):
            compressor.decompress_kv(replace(z, keys=damaged))
    for shape in ((1, 2, TOKENS + 1, DIM), (1, 3, TOKENS, DIM), (2, 2, TOKENS, DIM)):
        with pytest.raises(PayloadError, match=r"make up|missing"):
            compressor.decompress_kv(replace(z, shape=(shape, z.shape[1])))
    with pytest.raises(PayloadError):
        compressor.decompress_kv(replace(z, sinks=5))


def test_codes_beyond_the_codebook():
    compressor, z = compressed(NumPy, VectorQuantization(5, vector_dim=2))
    codes = np.full_like(z.keys.payload["codes"], 255)
    damaged = replace(z.keys, payload={**z.keys.payload, "codes": codes})
    with pytest.raises(PayloadError, match="from 0 to 4"):
        compressor.decompress_kv(replace(z, keys=damaged))


def test_arrays_that_only_look_usable(xp):
    x = np.ones((1, 2, 9, DIM), "float32")
    bad = {
        "numpy": lambda: [np.ma.masked_invalid(x)],
        "torch": lambda: [
            xp.module.ones(1, 2, 9, DIM, device="meta"),
            xp.module.ones(1, 2, 9, DIM).to_sparse(),
        ],
    }.get(xp.name, list)()
    if xp.is_jax:
        deleted = xp.module.ones((1, 2, 9, DIM))
        deleted.delete()
        bad = [deleted]
    for method in METHODS:
        for y in bad:
            with pytest.raises(KVCompressError, match="k is"):
                KVCacheCompressor(method).compress_kv(y, y)


@pytest.mark.library("torch")
def test_tensors_that_vmap_batches():
    import torch

    compressor = KVCacheCompressor(METHODS[0])

    def both(x):
        return compressor.decompress_kv(compressor.compress_kv(x, x))[0]

    with pytest.raises(KVCompressError, match="vmap"):
        torch.vmap(both)(torch.ones(3, 1, 2, 9, DIM))
