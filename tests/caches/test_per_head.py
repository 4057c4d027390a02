"""`PerHeadLatentAttention`."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from cache_kinds import (
    HEADS,
    KEY_DIM,
    KINDS,
    LATENT,
    LAYERS,
    VALUE_DIM,
    VALUE_LATENT,
    per_head,
    per_head_weights,
)

from kvcompress import MlaCompressedKVCache, PerHeadLatentAttention
from kvcompress.errors import DTypeError, NamespaceError, SettingError, ShapeError

KIND = KINDS[1]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_projections_are_the_oracle(xp: Any, layer: int, tokens: int) -> None:
    mla, names = per_head(xp, layer), list(range(tokens))
    latents = xp.run(_compress, mla, *map(xp.asarray, KIND.inputs(layer, names)))
    restored = xp.run(_restore, mla, *latents)
    rows = [KIND.row(layer, t, 0) for t in names]
    sizes = mla.cached_sizes
    KIND.check(xp, latents, rows, sizes)
    KIND.check_restored(xp, restored, layer, rows)
    assert all(xp.owns(x) for x in (*latents, *restored))


def test_axes_in_front(xp: Any) -> None:
    mla = per_head(xp)
    k, v = (np.stack([x, x + 1]) for x in KIND.inputs(0, [0, 1, 2]))
    latents = mla.compress(xp.asarray(k), xp.asarray(v))
    for b in range(2):
        alone = mla.compress(xp.asarray(k[b]), xp.asarray(v[b]))
        for x, y in zip(latents, alone, strict=True):
            np.testing.assert_array_equal(xp.numpy(x)[b], xp.numpy(y))
    restored = mla.restore(*latents)
    assert tuple(restored[0].shape) == k.shape
    assert tuple(restored[1].shape) == v.shape


def test_dtypes(xp: Any) -> None:
    """Products are float32 inside: a sum that float16 cannot hold comes out where it cancels."""
    for dtype in xp.dtypes:
        kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
        arrays = [np.array([[2.0**8], [-(2.0**8)]]), np.array([[1.0, 2.0]])]
        down, up = (xp.asarray(x.astype(kind)) for x in arrays)
        mla = PerHeadLatentAttention(down, up, num_heads=1)
        x = xp.asarray(np.full((1, 3, 2), 2.0**9).astype(kind))
        latents = mla.compress(x, x)
        assert mla.dtype == dtype
        for y in (*latents, *mla.restore(*latents)):
            assert y.dtype == x.dtype
            np.testing.assert_array_equal(xp.numpy(y).astype("float32"), 0)


def test_sizes(xp: Any) -> None:
    mla = per_head(xp)
    assert (mla.num_heads, mla.head_dim, mla.latent_dim) == (HEADS, KEY_DIM, LATENT)
    assert (mla.value_head_dim, mla.value_latent_dim) == (VALUE_DIM, VALUE_LATENT)
    assert mla.cached_sizes == (HEADS, LATENT, VALUE_LATENT)
    shared = per_head(xp, 1)
    assert (shared.value_head_dim, shared.value_latent_dim) == (KEY_DIM, LATENT)
    for duplicate in (copy.deepcopy(mla), pickle.loads(pickle.dumps(mla))):
        np.testing.assert_array_equal(xp.numpy(duplicate.down_proj), xp.numpy(mla.down_proj))
        assert duplicate.num_heads == HEADS


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("up_proj", lambda x: x[:, :-1], r"up_proj must be \[latent_dim = 2, head_dim = 3\]"),
        ("rope_key", lambda x: x[:-1], r"rope_key must be \[latent_dim = 2, head_dim = 3\]"),
        ("down_proj", lambda x: x[0], "down_proj must be"),
        ("down_proj", lambda x: x[:, :0], "down_proj must be"),
        ("value_up_proj", lambda x: x[:, :-1], "value_up_proj must be .*value_head_dim = 2"),
        ("value_up_proj", lambda x: x.astype(np.int32), "must have the dtype of down_proj"),
        ("value_up_proj", lambda _: None, "must be given together"),
        ("value_down_proj", lambda _: None, "must be given together"),
    ],
)
def test_projections_that_do_not_fit(xp: Any, name: str, change: Any, error: str) -> None:
    arrays = per_head_weights(0)
    arrays[name] = change(arrays[name])
    given = {n: None if x is None else xp.asarray(x) for n, x in arrays.items()}
    mla = PerHeadLatentAttention(**given, num_heads=HEADS)
    kind = DTypeError if "dtype" in error else SettingError if "given" in error else ShapeError
    k, v = (xp.asarray(x) for x in KIND.inputs(0, [0]))
    for use in (
        mla.check,
        lambda: MlaCompressedKVCache([mla], 4),
        lambda: mla.compress(k, v),
        lambda: mla.restore(k, v),
    ):
        with pytest.raises(kind, match=error):
            use()


@pytest.mark.parametrize("heads", [0, -1, 2.0, True, None])
def test_numbers_of_heads_that_do_not_fit(xp: Any, heads: Any) -> None:
    mla = dataclasses.replace(per_head(xp), num_heads=heads)
    with pytest.raises(SettingError, match="num_heads must be an integer >= 1"):
        MlaCompressedKVCache([mla], 4)


def test_arrays_that_do_not_fit(xp: Any) -> None:
    mla = per_head(xp)
    k, v = (xp.asarray(x) for x in KIND.inputs(0, [0, 1]))
    latents = mla.compress(k, v)
    for use, (x, y) in ((mla.compress, (k, v)), (mla.restore, latents)):
        for error, arrays in (
            (ShapeError, (y, x)),
            (ShapeError, (x[:1, ...], y[:1, ...])),
            (ShapeError, (x[0, ...], y[0, ...])),
            (ShapeError, (x[:, :1, :], y)),
            (NamespaceError, (x, None)),
            (NamespaceError, (xp.numpy(x).tolist(), y)),
            (DTypeError, (xp.asarray(np.ones(tuple(x.shape), "int32")), y)),
        ):
            with pytest.raises(error):
                use(*arrays)


def test_frozen() -> None:
    mla = PerHeadLatentAttention(**per_head_weights(0), num_heads=HEADS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mla.num_heads = 3  # type: ignore[misc]


def _compress(mla: PerHeadLatentAttention, k: Any, v: Any) -> Any:
    return mla.compress(k, v)


def _restore(mla: PerHeadLatentAttention, k: Any, v: Any) -> Any:
    return mla.restore(k, v)
