"""`MultiHeadLatentAttention`, and what is particular to a cache of latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from cache_kinds import (
    HEADS,
    HIDDEN,
    KINDS,
    LATENT,
    LAYERS,
    NOPE,
    RANK,
    ROPE,
    ROTATION,
    VALUE_DIM,
    VALUE_LATENT,
    cached,
    deepseek,
    deepseek_weights,
    per_head,
    up,
)

from kvcompress import (
    KVCacheCompressor,
    KVLayout,
    LowRank,
    MlaCompressedKVCache,
    MultiHeadLatentAttention,
    PerHeadLatentAttention,
    RoPE,
)
from kvcompress.backend import select
from kvcompress.errors import (
    DTypeError,
    LayoutError,
    NamespaceError,
    SettingError,
    ShapeError,
)
from kvcompress.methods.base import TensorSpec

BATCH = 2
_, PER_HEAD, DEEPSEEK = KINDS
latent_kinds = pytest.mark.parametrize("kind", [PER_HEAD, DEEPSEEK], ids=str)


def states(tokens: int, seed: int = 0, *, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, (batch, tokens, HIDDEN)).astype(np.float32)


def close(xp: Any, got: Any, expected: Any, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(xp.numpy(got), expected, rtol=1e-5, atol=atol)


def oracle(w: dict[str, np.ndarray], hidden: np.ndarray, positions: np.ndarray) -> Any:
    """`cached` and `restored` for all tokens, in the shapes of the library."""
    batch, tokens, _ = hidden.shape
    latent, key = np.empty((batch, tokens, RANK)), np.empty((batch, tokens, ROPE))
    k, v = (
        np.empty((batch, HEADS, tokens, NOPE + ROPE)),
        np.empty((batch, HEADS, tokens, VALUE_DIM)),
    )
    for b in range(batch):
        for t in range(tokens):
            latent[b, t], key[b, t] = cached(w, hidden[b, t], positions[b, t])
            k[b, :, t], v[b, :, t] = up(w, latent[b, t], key[b, t])
    return latent, key, k, v


@pytest.mark.parametrize("norm", [False, True])
def test_projections_are_the_oracle(xp: Any, norm: bool) -> None:
    mla, hidden = deepseek(xp, norm=norm), states(3)
    positions = np.array([[0, 1, 2], [700, 5, 44]], dtype=np.int32)
    latent, key = xp.run(_compress, mla, xp.asarray(hidden), xp.asarray(positions))
    k, v = xp.run(_restore, mla, latent, key)
    expected = oracle(deepseek_weights(norm=norm), hidden, positions)
    for got, wanted in zip((latent, key, k, v), expected, strict=True):
        assert xp.owns(got)
        assert tuple(got.shape) == wanted.shape
        close(xp, got, wanted, atol=1e-3)  # float32 angles: 700 * 2**-22 radians of keys up to 20
    if not norm:
        np.testing.assert_array_equal(xp.numpy(latent), expected[0])
        np.testing.assert_array_equal(xp.numpy(v), expected[3])


def test_dtypes(xp: Any) -> None:
    positions = xp.asarray(np.arange(3, dtype=np.int32))
    for dtype in xp.dtypes:
        kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
        mla, hidden = deepseek(xp, dtype=kind), xp.asarray(states(3).astype(kind))
        latent, key = xp.run(_compress, mla, hidden, positions)
        k, v = xp.run(_restore, mla, latent, key)
        assert mla.dtype == dtype
        assert latent.dtype == key.dtype == k.dtype == v.dtype == hidden.dtype


def test_no_tokens(xp: Any) -> None:
    mla, positions = deepseek(xp, norm=True), xp.asarray(np.zeros(0, dtype=np.int32))
    latent, key = xp.run(_compress, mla, xp.asarray(states(0)), positions)
    assert (tuple(latent.shape), tuple(key.shape)) == ((BATCH, 0, RANK), (BATCH, 0, ROPE))
    k, v = xp.run(_restore, mla, latent, key)
    assert tuple(k.shape) == (BATCH, HEADS, 0, NOPE + ROPE)
    assert tuple(v.shape) == (BATCH, HEADS, 0, VALUE_DIM)


def test_sizes(xp: Any) -> None:
    mla = deepseek(xp, norm=True)
    sizes = (mla.num_heads, mla.hidden_dim, mla.kv_lora_rank, mla.rope_dim)
    assert sizes == (HEADS, HIDDEN, RANK, ROPE)
    assert mla.cached_sizes == (1, ROPE, RANK)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("key_up", lambda x: x[:, :-1, :], r"key_up must be \[num_heads, kv_lora_rank = 5"),
        ("value_up", lambda x: x[:-1], r"value_up must be \[num_heads = 2, kv_lora_rank = 5"),
        ("key_rope", lambda x: x[:, :-1], "key_rope must be .*rope_dim = 4"),
        ("key_rope", lambda x: x[:-1], "key_rope must be .*hidden_dim = 6"),
        ("kv_down", lambda x: x[:, 0], "kv_down must be"),
        ("kv_down", lambda x: x[:, :0], "kv_down must be"),
        ("latent_norm", lambda x: x[:-1], "latent_norm must be .*kv_lora_rank = 5"),
        ("value_up", lambda x: x.astype(np.int32), "value_up must have the dtype of kv_down"),
    ],
)
def test_projections_that_do_not_fit(xp: Any, name: str, change: Any, error: str) -> None:
    arrays = deepseek_weights(norm=True)
    arrays[name] = change(arrays[name])
    mla = MultiHeadLatentAttention(**{n: xp.asarray(x) for n, x in arrays.items()}, rope=ROTATION)
    positions = xp.asarray(np.arange(2, dtype=np.int32))
    kind = DTypeError if "dtype" in error else ShapeError
    for use in (
        mla.check,
        lambda: MlaCompressedKVCache([mla], 4),
        lambda: mla.compress(xp.asarray(states(2)), positions),
    ):
        with pytest.raises(kind, match=error):
            use()


def test_weights_of_another_kind() -> None:
    w = deepseek_weights()
    with pytest.raises(DTypeError, match="got float64"):
        MultiHeadLatentAttention(
            **{n: x.astype(np.float64) for n, x in w.items()}, rope=ROTATION
        ).check()
    with pytest.raises(NamespaceError):
        MultiHeadLatentAttention(**(w | {"key_up": w["key_up"].tolist()}), rope=ROTATION).check()


def test_layers_that_make_no_cache(xp: Any) -> None:
    mla = deepseek(xp)
    with pytest.raises(SettingError, match="at least one"):
        MlaCompressedKVCache([], 4)
    for layers in (mla, 3):
        with pytest.raises(SettingError, match="layers must be a sequence of Multi"):
            MlaCompressedKVCache(layers, 4)
    with pytest.raises(SettingError, match=r"layers must be MultiHead.* got RoPE"):
        MlaCompressedKVCache([mla, ROTATION], 4)
    if xp.name == "numpy":
        with pytest.raises(DTypeError, match="layer 1 must have the dtype of layer 0"):
            MlaCompressedKVCache([mla, deepseek(xp, dtype="float16")], 4)


@pytest.mark.library("strict")
def test_layers_of_two_libraries() -> None:
    strict = pytest.importorskip("array_api_strict")

    class Library:
        asarray = staticmethod(strict.asarray)

    class Host:
        asarray = staticmethod(np.asarray)

    with pytest.raises(NamespaceError):
        MlaCompressedKVCache([deepseek(Host), deepseek(Library)], 4)


@pytest.mark.library("jax")
def test_a_compiler_cannot_make_a_cache() -> None:
    jax = pytest.importorskip("jax")

    class Library:
        asarray = staticmethod(jax.numpy.asarray)

    def make(mla: Any) -> int:
        MlaCompressedKVCache([mla], 4)
        return 0

    for mla in (deepseek(Library), per_head(Library)):
        with pytest.raises(NamespaceError, match="traced"):
            jax.jit(make)(mla)


@latent_kinds
def test_what_the_projections_say(xp: Any, kind: Any) -> None:
    for dtype in xp.dtypes:
        number = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
        make = per_head if kind is PER_HEAD else deepseek
        cache = MlaCompressedKVCache([make(xp, dtype=number)], 3, block_size=2)
        assert (cache.dtype, cache.num_layers, cache.num_total_blocks) == (dtype, 1, 3)
        cache.allocate_sequence(0)
        inputs = [xp.asarray(x.astype(number)) for x in kind.inputs(0, [1, 2, 3])]
        kind.add(cache, 0, 0, *inputs)
        for x in (*cache.get_kv(0, 0), *cache.get_compressed_kv(0, 0)):
            assert xp.owns(x)
            assert x.dtype == inputs[0].dtype
        # Small integers: what each dtype holds of them is exact.
        rows = [kind.row(0, t, i) for i, t in enumerate([1, 2, 3])]
        for x, part in zip(cache.get_compressed_kv(0, 0), zip(*rows, strict=True), strict=True):
            expected = np.array(part).transpose(1, 0, 2)
            tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
            got = xp.numpy(x).astype(np.float64)
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=10 * tolerance)


def test_layers_of_both_kinds(xp: Any) -> None:
    cache = MlaCompressedKVCache([per_head(xp, 0), deepseek(xp, 0)], 6, block_size=4)
    cache.allocate_sequence("a")
    rows = [
        kind.append(xp, cache, layer, "a", [0, 1, 2, 3, 4])
        for layer, kind in enumerate((PER_HEAD, DEEPSEEK))
    ]
    PER_HEAD.check_restored(xp, cache.get_kv(0, "a"), 0, rows[0])
    assert tuple(cache.get_kv(1, "a")[0].shape) == (HEADS, 5, NOPE + ROPE)
    k, v = cache.get_compressed_kv(0, "a")
    assert (tuple(k.shape), tuple(v.shape)) == ((HEADS, 5, LATENT), (HEADS, 5, VALUE_LATENT))
    k, v = cache.get_compressed_kv(1, "a")
    assert (tuple(k.shape), tuple(v.shape)) == ((1, 5, ROPE), (1, 5, RANK))
    for part in ("MultiHeadLatentAttention", "PerHeadLatentAttention"):
        assert part in repr(cache)


def test_the_call_that_fits(xp: Any) -> None:
    cache = MlaCompressedKVCache([per_head(xp, 0), deepseek(xp, 0)], 6)
    cache.allocate_sequence("a")
    arrays = [xp.asarray(x) for x in PER_HEAD.inputs(0, [0])]
    hidden = [xp.asarray(x) for x in DEEPSEEK.inputs(0, [0])]
    with pytest.raises(LayoutError, match=r"layer 1 is a Multi.* use append_hidden\(layer, seq"):
        cache.append(1, "a", *arrays)
    with pytest.raises(LayoutError, match=r"layer 0 is a PerHead.* use append\(layer, seq_id, k"):
        cache.append_hidden(0, "a", *hidden)
    assert [cache.seq_len(layer, "a") for layer in (0, 1)] == [0, 0]


@latent_kinds
def test_positions_follow_the_tokens_held(xp: Any, kind: Any) -> None:
    """In pieces or at once, after a fork or a truncation: a token has one latent at a position."""
    cache = kind.make(xp)
    cache.allocate_sequence("pieces")
    rows = kind.append(xp, cache, 0, "pieces", [0, 1, 2])
    cache.truncate("pieces", 2)
    cache.fork("pieces", "fork")
    for name in ("pieces", "fork"):
        longer = rows[:2] + kind.append(xp, cache, 0, name, [3])
        longer += kind.append(xp, cache, 0, name, [4, 5])
        kind.check_held(xp, cache, 0, name, longer)
    cache.allocate_sequence("once")
    kind.append(xp, cache, 0, "once", [0, 1, 3, 4, 5])
    for x, y in zip(
        cache.get_compressed_kv(0, "once"), cache.get_compressed_kv(0, "fork"), strict=True
    ):
        np.testing.assert_allclose(xp.numpy(x), xp.numpy(y), rtol=1e-5, atol=2e-5)


@latent_kinds
def test_swapped_out_and_back_without_projecting_twice(
    xp: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"keys": LowRank(1), "values": LowRank(1)}
    compressor = KVCacheCompressor(methods["keys"], value_method=methods["values"])
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 1, "a", [7, 3, 1, 9, 4, 2, 8, 5, 6])
    originals = cache.get_compressed_kv(1, "a")

    def projected(*_: Any) -> None:
        raise AssertionError("the latents were projected again")

    back = MlaCompressedKVCache(cache.layers, 4)
    back.allocate_sequence("b")
    with monkeypatch.context() as patch:
        for owner in (MultiHeadLatentAttention, PerHeadLatentAttention):
            patch.setattr(owner, "compress", projected)
            patch.setattr(owner, "restore", projected)
        compressed = compressor.compress_mla_cache(cache, 1, "a")
        compressor.decompress_to_mla_cache(compressed, back, 1, "b")

    assert compressed.layout is KVLayout.LATENT
    assert compressed.shape == tuple(tuple(x.shape) for x in originals)
    restored = back.get_compressed_kv(1, "b")
    lossy = []
    for (role, m), x, got in zip(methods.items(), originals, restored, strict=True):
        dispatch, spec = select("generic"), TensorSpec(tuple(x.shape), "float32")
        alone = m.decode(m.encode(x, role, dispatch), spec, role, dispatch)
        np.testing.assert_array_equal(xp.numpy(got), xp.numpy(alone))
        lossy.append(not np.array_equal(xp.numpy(got), xp.numpy(x)))
    assert any(lossy)
    kind.append(xp, back, 1, "b", [1])
    assert back.seq_len(1, "b") == 10
    with pytest.raises(LayoutError, match="decompress_to_mla_cache"):
        compressor.decompress_kv_3d(compressed)
    with pytest.raises(LayoutError, match="of latents"):
        compressor.decompress_to_mla_cache(compressor.compress_kv_3d(*originals), back, 1, "b")


@latent_kinds
def test_a_lossless_swap_restores_keys_and_values(xp: Any, kind: Any) -> None:
    _, key_width, value_width = kind.make(xp).layers[1].cached_sizes
    compressor = KVCacheCompressor(LowRank(key_width), value_method=LowRank(value_width))
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 1, "a", list(range(9)))
    cache.allocate_sequence("b")
    compressed = compressor.compress_mla_cache(cache, 1, "a")
    compressor.decompress_to_mla_cache(compressed, cache, 1, "b")
    for got, expected in zip(cache.get_kv(1, "b"), cache.get_kv(1, "a"), strict=True):
        close(xp, got, xp.numpy(expected), atol=1e-3)


@latent_kinds
def test_an_mla_cache_is_compressed_as_a_paged_one(xp: Any, kind: Any) -> None:
    """The compressor then sees keys and values, whatever holds them."""
    compressor = KVCacheCompressor(LowRank(1))
    cache = kind.make(xp)
    cache.allocate_sequence("a")
    kind.append(xp, cache, 0, "a", list(range(6)))
    compressed = compressor.compress_paged_cache(cache, 0, "a")
    assert compressed.layout is KVLayout.UNBATCHED
    assert compressed.shape == tuple(tuple(x.shape) for x in cache.get_kv(0, "a"))


def test_where_latents_are(xp: Any) -> None:
    cache = DEEPSEEK.make(xp)
    cache.allocate_sequence("a")
    DEEPSEEK.append(xp, cache, LAYERS - 1, "a", list(range(6)))
    paged = cache.paged_compressed_kv(LAYERS - 1, "a")
    for x, y in zip(paged, cache.get_compressed_kv(LAYERS - 1, "a"), strict=True):
        np.testing.assert_array_equal(xp.numpy(select("generic").array(x)), xp.numpy(y))


@pytest.mark.parametrize("shape", [(2, HIDDEN - 1), (1, 2, HIDDEN), (HIDDEN,)], ids=str)
def test_hidden_states_that_do_not_fit(xp: Any, shape: tuple[int, ...]) -> None:
    cache = DEEPSEEK.make(xp)
    cache.allocate_sequence("a")
    with pytest.raises(ShapeError, match=r"hidden must be \[new tokens, 6\], got shape"):
        cache.append_hidden(0, "a", xp.asarray(np.ones(shape, "float32")))


@pytest.mark.library("torch")
def test_deepseek_v2_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    deepseek = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = deepseek.DeepseekV2Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1,
        q_lora_rank=8, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    torch.manual_seed(0)
    model = deepseek.DeepseekV2Attention(config, 0).eval().requires_grad_(False)
    model.kv_a_layernorm.weight.copy_(torch.rand(16) + 0.5)
    hidden, positions = torch.randn(2, 7, 32), torch.arange(100, 107)

    down, rope = model.kv_a_proj_with_mqa(hidden).split([16, 8], dim=-1)
    latent = model.kv_a_layernorm(down)
    turns = deepseek.DeepseekV2RotaryEmbedding(config)(hidden, positions[None])
    _, key = deepseek.apply_rotary_emb(rope[:, None], rope[:, None], turns)
    nope, v = model.kv_b_proj(latent).view(2, 7, 4, 16).transpose(1, 2).split([6, 10], dim=-1)
    k = torch.cat([nope, key.expand(-1, 4, -1, -1)], dim=-1)

    a, b = model.kv_a_proj_with_mqa.weight.T, model.kv_b_proj.weight.view(4, 16, 16).mT
    mla = MultiHeadLatentAttention(
        kv_down=a[:, :16],
        key_rope=a[:, 16:],
        key_up=b[..., :6],
        value_up=b[..., 6:],
        rope=RoPE(8, 1e4, interleaved=True),
        latent_norm=model.kv_a_layernorm.weight.detach(),
    )
    got = mla.compress(hidden, positions)
    for ours, theirs in zip((*got, *mla.restore(*got)), (latent, key[:, 0], k, v), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_frozen() -> None:
    mla = MultiHeadLatentAttention(**deepseek_weights(), rope=ROTATION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mla.norm_eps = 0.0  # type: ignore[misc]


def _compress(mla: MultiHeadLatentAttention, hidden: Any, positions: Any) -> Any:
    return mla.compress(hidden, positions)


def _restore(mla: MultiHeadLatentAttention, latent: Any, rope_key: Any) -> Any:
    return mla.restore(latent, rope_key)
