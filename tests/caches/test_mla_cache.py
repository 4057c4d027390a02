from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcompress import (
    KVCacheCompressor,
    KVLayout,
    LowRank,
    MlaCompressedKVCache,
    MultiHeadLatentAttention,
    RoPE,
)
from kvcompress.backend import select
from kvcompress.errors import (
    DTypeError,
    LayoutError,
    NamespaceError,
    SettingError,
    ShapeError,
    UnknownLayer,
)
from kvcompress.methods.base import TensorSpec

LAYERS, BATCH, HEADS, HIDDEN, RANK, ROPE, NOPE, VALUE = 2, 2, 3, 6, 5, 4, 2, 3
ROTATION = RoPE(ROPE, 100.0, interleaved=True)
SHAPES = {
    "kv_down": (HIDDEN, RANK),
    "key_up": (HEADS, RANK, NOPE),
    "value_up": (HEADS, RANK, VALUE),
    "key_rope": (HIDDEN, ROPE),
}


def weights(seed: int = 0, *, norm: bool = False) -> dict[str, np.ndarray]:
    """Small integers, so that sums of products are exact in float32 in any order."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(-2, 3, shape) for name, shape in SHAPES.items()}
    if norm:
        arrays["latent_norm"] = rng.integers(1, 5, RANK)
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def make(xp: Any, seed: int = 0, *, norm: bool = False, dtype: Any = "float32") -> Any:
    arrays = {n: xp.asarray(x.astype(dtype)) for n, x in weights(seed, norm=norm).items()}
    return MultiHeadLatentAttention(**arrays, rope=ROTATION)


def states(tokens: int, seed: int = 0, *, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, (batch, tokens, HIDDEN)).astype(np.float32)


def cached(w: dict[str, np.ndarray], hidden: np.ndarray, position: int) -> tuple[Any, Any]:
    """Float64 oracle for one token: its latent and its RoPE key."""
    latent = w["kv_down"].T.astype(np.float64) @ hidden
    if "latent_norm" in w:
        latent = latent / np.sqrt((latent**2).mean() + 1e-6) * w["latent_norm"]
    key = w["key_rope"].T.astype(np.float64) @ hidden
    for i in range(0, ROPE, 2):
        turned = complex(*key[i : i + 2]) * np.exp(1j * position * ROTATION.theta ** (-i / ROPE))
        key[i : i + 2] = turned.real, turned.imag
    return latent, key


def restored(w: dict[str, np.ndarray], latent: np.ndarray, key: np.ndarray) -> tuple[Any, Any]:
    """Float64 oracle for one token: keys and values of every head."""
    k = [np.concatenate([w["key_up"][h].T @ latent, key]) for h in range(HEADS)]
    v = [w["value_up"][h].T @ latent for h in range(HEADS)]
    return np.array(k, dtype=np.float64), np.array(v, dtype=np.float64)


def close(xp: Any, got: Any, expected: Any, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(xp.numpy(got), expected, rtol=1e-5, atol=atol)


def oracle(w: dict[str, np.ndarray], hidden: np.ndarray, positions: np.ndarray) -> Any:
    """`cached` and `restored` for all tokens, in the shapes of the library."""
    batch, tokens, _ = hidden.shape
    latent, key = np.empty((batch, tokens, RANK)), np.empty((batch, tokens, ROPE))
    k, v = np.empty((batch, HEADS, tokens, NOPE + ROPE)), np.empty((batch, HEADS, tokens, VALUE))
    for b in range(batch):
        for t in range(tokens):
            latent[b, t], key[b, t] = cached(w, hidden[b, t], positions[b, t])
            k[b, :, t], v[b, :, t] = restored(w, latent[b, t], key[b, t])
    return latent, key, k, v


@pytest.mark.parametrize("norm", [False, True])
def test_projections_are_the_oracle(xp: Any, norm: bool) -> None:
    mla, hidden = make(xp, norm=norm), states(3)
    positions = np.array([[0, 1, 2], [700, 5, 44]], dtype=np.int32)
    latent, key = xp.run(_compress, mla, xp.asarray(hidden), xp.asarray(positions))
    k, v = xp.run(_restore, mla, latent, key)
    expected = oracle(weights(norm=norm), hidden, positions)
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
        mla, hidden = make(xp, dtype=kind), xp.asarray(states(3).astype(kind))
        latent, key = xp.run(_compress, mla, hidden, positions)
        k, v = xp.run(_restore, mla, latent, key)
        assert mla.dtype == dtype
        assert latent.dtype == key.dtype == k.dtype == v.dtype == hidden.dtype


def test_no_tokens(xp: Any) -> None:
    mla, positions = make(xp, norm=True), xp.asarray(np.zeros(0, dtype=np.int32))
    latent, key = xp.run(_compress, mla, xp.asarray(states(0)), positions)
    assert (tuple(latent.shape), tuple(key.shape)) == ((BATCH, 0, RANK), (BATCH, 0, ROPE))
    k, v = xp.run(_restore, mla, latent, key)
    assert tuple(k.shape) == (BATCH, HEADS, 0, NOPE + ROPE)
    assert tuple(v.shape) == (BATCH, HEADS, 0, VALUE)


def test_sizes_and_copies(xp: Any) -> None:
    mla = make(xp, norm=True)
    sizes = (mla.num_heads, mla.hidden_dim, mla.kv_lora_rank, mla.rope_dim)
    assert sizes == (HEADS, HIDDEN, RANK, ROPE)
    cache = MlaCompressedKVCache([mla])
    cache.append(0, xp.asarray(states(3)))
    for duplicate in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for x, y in zip(duplicate.get_kv(0), cache.get_kv(0), strict=True):
            np.testing.assert_array_equal(xp.numpy(x), xp.numpy(y))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("key_up", lambda x: x[:, :-1, :], r"key_up must be \[num_heads, kv_lora_rank = 5"),
        ("value_up", lambda x: x[:-1], r"value_up must be \[num_heads = 3, kv_lora_rank = 5"),
        ("key_rope", lambda x: x[:, :-1], "key_rope must be .*rope_dim = 4"),
        ("key_rope", lambda x: x[:-1], "key_rope must be .*hidden_dim = 6"),
        ("kv_down", lambda x: x[:, 0], "kv_down must be"),
        ("kv_down", lambda x: x[:, :0], "kv_down must be"),
        ("latent_norm", lambda x: x[:-1], "latent_norm must be .*kv_lora_rank = 5"),
        ("value_up", lambda x: x.astype(np.int32), "value_up must have the dtype of kv_down"),
    ],
)
def test_projections_that_do_not_fit(xp: Any, name: str, change: Any, error: str) -> None:
    arrays = weights(norm=True)
    arrays[name] = change(arrays[name])
    mla = MultiHeadLatentAttention(**{n: xp.asarray(x) for n, x in arrays.items()}, rope=ROTATION)
    positions = xp.asarray(np.arange(2, dtype=np.int32))
    kind = DTypeError if "dtype" in error else ShapeError
    for use in (
        mla.check,
        lambda: MlaCompressedKVCache([mla]),
        lambda: mla.compress(xp.asarray(states(2)), positions),
    ):
        with pytest.raises(kind, match=error):
            use()


def test_weights_of_another_kind() -> None:
    w = weights()
    with pytest.raises(DTypeError, match="got float64"):
        MultiHeadLatentAttention(
            **{n: x.astype(np.float64) for n, x in w.items()}, rope=ROTATION
        ).check()
    with pytest.raises(NamespaceError):
        MultiHeadLatentAttention(**(w | {"key_up": w["key_up"].tolist()}), rope=ROTATION).check()
    with pytest.raises(SettingError, match="at least one"):
        MlaCompressedKVCache([])


class MlaMachine(RuleBasedStateMachine):
    """An MLA cache against plain lists of rows, one per layer and batch entry."""

    def __init__(self, xp: Any) -> None:
        super().__init__()
        self.xp = xp
        self.weights = [weights(seed, norm=seed == 1) for seed in range(LAYERS)]
        layers = [make(xp, seed, norm=seed == 1) for seed in range(LAYERS)]
        self.cache = MlaCompressedKVCache(layers)
        # Rows of tokens: a latent and a RoPE key for every batch entry.
        self.model: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(LAYERS)]
        self.started = False
        self.reads: list[tuple[Any, np.ndarray]] = []
        self.seed = 0

    layers = st.integers(0, LAYERS - 1)

    @rule(layer=layers, count=st.integers(0, 3))
    def append(self, layer: int, count: int) -> None:
        self.seed += 1
        hidden = states(count, self.seed)
        self.cache.append(layer, self.xp.asarray(hidden))
        self.started = True
        for t in range(count):
            position = len(self.model[layer])
            per_batch = [cached(self.weights[layer], hidden[b, t], position) for b in range(BATCH)]
            latent, key = (np.array(x) for x in zip(*per_batch, strict=True))
            self.model[layer].append((latent, key))

    @rule(layer=layers, count=st.integers(0, 3))
    def append_compressed(self, layer: int, count: int) -> None:
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        latent = rng.standard_normal((BATCH, count, RANK)).astype(np.float32)
        key = rng.standard_normal((BATCH, count, ROPE)).astype(np.float32)
        self.cache.append_compressed(layer, self.xp.asarray(latent), self.xp.asarray(key))
        self.started = True
        self.model[layer] += [(latent[:, t], key[:, t]) for t in range(count)]

    @rule(length=st.integers(0, 8))
    def truncate(self, length: int) -> None:
        self.cache.truncate(length)
        for rows in self.model:
            del rows[length:]

    @rule(layer=layers)
    def get_kv(self, layer: int) -> None:
        if not self.started:
            with pytest.raises(ShapeError, match="batch size is not known"):
                self.cache.get_kv(layer)
            return
        k, v = self.cache.get_kv(layer)
        rows = self.model[layer]
        assert tuple(k.shape) == (BATCH, HEADS, len(rows), NOPE + ROPE)
        assert tuple(v.shape) == (BATCH, HEADS, len(rows), VALUE)
        k, v = self.xp.numpy(k), self.xp.numpy(v)
        for t, (latent, key) in enumerate(rows):
            for b in range(BATCH):
                expected = restored(self.weights[layer], latent[b], key[b])
                np.testing.assert_allclose(k[b, :, t], expected[0], rtol=1e-5, atol=2e-4)
                np.testing.assert_allclose(v[b, :, t], expected[1], rtol=1e-5, atol=2e-4)

    @precondition(lambda self: self.started)
    @rule(layer=layers)
    def keep_what_was_read(self, layer: int) -> None:
        arrays = (*self.cache.get_compressed_kv(layer), *self.cache.get_kv(layer))
        self.reads += [(x, self.xp.numpy(x)) for x in arrays]

    @precondition(lambda self: self.reads)
    @rule()
    def what_was_read_stays(self) -> None:
        for x, kept in self.reads:
            np.testing.assert_array_equal(self.xp.numpy(x), kept)

    @precondition(lambda self: self.started)
    @rule(layer=layers)
    def wrong_batch(self, layer: int) -> None:
        with pytest.raises(ShapeError, match=f"batch of {BATCH}, got {BATCH + 1}"):
            self.cache.append(layer, self.xp.asarray(states(1, batch=BATCH + 1)))

    @invariant()
    def rows_are_those_of_the_layer(self) -> None:
        assert self.cache.batch == (BATCH if self.started else None)
        for layer, rows in enumerate(self.model):
            assert self.cache.seq_len(layer) == len(rows)
            if not self.started:
                continue
            latent, key = (self.xp.numpy(x) for x in self.cache.get_compressed_kv(layer))
            assert latent.shape == (BATCH, len(rows), RANK)
            assert key.shape == (BATCH, len(rows), ROPE)
            for t, row in enumerate(rows):
                np.testing.assert_allclose(latent[:, t], row[0], rtol=1e-5, atol=2e-5)
                np.testing.assert_allclose(key[:, t], row[1], rtol=1e-5, atol=2e-4)


def test_against_lists_of_rows(xp: Any) -> None:
    if xp.name == "jax-jit":
        pytest.skip("a cache is used eagerly")
    examples, steps = (30, 25) if xp.name == "numpy" else (3, 10)
    run_state_machine_as_test(
        lambda: MlaMachine(xp),
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None),
    )


def test_the_caller_owns_what_goes_in_and_comes_out(xp: Any) -> None:
    cache = MlaCompressedKVCache([make(xp)])
    latent, key = (xp.asarray(np.ones((BATCH, 2, n), "float32")) for n in (RANK, ROPE))
    cache.append_compressed(0, latent, key)
    taken = [latent, key, *cache.get_compressed_kv(0), *cache.get_kv(0)]
    if xp.name not in ("numpy-readonly", "jax", "jax-jit"):
        for x in taken:
            x[...] = float("nan")
    for x in cache.get_compressed_kv(0):
        np.testing.assert_array_equal(xp.numpy(x), np.ones(x.shape))


def test_an_empty_layer_beside_a_full_one(xp: Any) -> None:
    cache = MlaCompressedKVCache([make(xp), make(xp, 1)])
    for read in (cache.get_kv, cache.get_compressed_kv):
        with pytest.raises(ShapeError, match="batch size is not known"):
            read(1)
    cache.append(0, xp.asarray(states(2)))
    latent, key = cache.get_compressed_kv(1)
    assert (tuple(latent.shape), tuple(key.shape)) == ((BATCH, 0, RANK), (BATCH, 0, ROPE))
    assert latent.dtype == xp.module.float32
    assert xp.owns(key)


def test_wrong_arrays_change_nothing(xp: Any) -> None:
    cache = MlaCompressedKVCache([make(xp)])
    cache.append(0, xp.asarray(states(2)))
    before = [xp.numpy(x) for x in cache.get_compressed_kv(0)]
    latent, key = (xp.asarray(np.ones((BATCH, 2, n), "float32")) for n in (RANK, ROPE))
    wrong = xp.asarray(np.ones((BATCH, 2, RANK), "int32"))
    for error, arrays in (
        (ShapeError, (key, latent)),
        (ShapeError, (latent[:, :1, :], key)),
        (ShapeError, (latent[0, ...], key[0, ...])),
        (DTypeError, (wrong, key)),
        (NamespaceError, (latent, [1.0])),
    ):
        with pytest.raises(error):
            cache.append_compressed(0, *arrays)
    for error, hidden in (
        (ShapeError, xp.asarray(states(2)[..., :-1])),
        (ShapeError, xp.asarray(states(2)[0])),
        (ShapeError, xp.asarray(np.ones(HIDDEN, "float32"))),
        (ShapeError, xp.asarray(states(2, batch=1))),
        (DTypeError, xp.asarray(states(2).astype("int32"))),
        (NamespaceError, states(2).tolist()),
    ):
        with pytest.raises(error):
            cache.append(0, hidden)
    for layer in (-1, 1, 0.5, "0"):
        for use in (cache.seq_len, cache.get_kv, cache.get_compressed_kv):
            with pytest.raises(UnknownLayer, match="layer must be from 0 to 0"):
                use(layer)
        with pytest.raises(UnknownLayer):
            cache.append(layer, xp.asarray(states(2)))
        with pytest.raises(UnknownLayer):
            cache.append_compressed(layer, latent, key)
    for length in (-1, 1.0, None):
        with pytest.raises(SettingError, match="length must be"):
            cache.truncate(length)
    for x, kept in zip(cache.get_compressed_kv(0), before, strict=True):
        np.testing.assert_array_equal(xp.numpy(x), kept)


@pytest.mark.library("jax")
def test_a_compiler_cannot_append() -> None:
    jax = pytest.importorskip("jax")
    arrays = {name: jax.numpy.asarray(x) for name, x in weights().items()}
    cache = MlaCompressedKVCache([MultiHeadLatentAttention(**arrays, rope=ROTATION)])

    @jax.jit
    def traced(hidden: Any) -> int:
        cache.append(0, hidden)
        return 0

    with pytest.raises(NamespaceError, match="traced"):
        traced(jax.numpy.asarray(states(2)))
    assert (cache.batch, cache.seq_len(0)) == (None, 0)


def test_repr(xp: Any) -> None:
    cache = MlaCompressedKVCache([make(xp), make(xp, 1)])
    cache.append(0, xp.asarray(states(3)))
    for part in ("2 layers", f"batch {BATCH}", "0 to 3 tokens"):
        assert part in repr(cache)


def test_swapped_out_and_back_without_projecting_twice(
    xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"keys": LowRank(3), "values": LowRank(2)}
    compressor = KVCacheCompressor(methods["keys"], value_method=methods["values"])
    cache = MlaCompressedKVCache([make(xp)])
    cache.append(0, xp.asarray(states(9)))
    latent, key = cache.get_compressed_kv(0)

    def projected(*_: Any) -> None:
        raise AssertionError("the latents were projected again")

    with monkeypatch.context() as patch:
        patch.setattr(MultiHeadLatentAttention, "compress", projected)
        patch.setattr(MultiHeadLatentAttention, "restore", projected)
        compressed = compressor.compress_mla_cache(cache, 0)
        back = MlaCompressedKVCache(cache.layers)
        compressor.decompress_to_mla_cache(compressed, back, 0)

    assert compressed.layout is KVLayout.LATENT
    assert compressed.shape == ((BATCH, 9, ROPE), (BATCH, 9, RANK))
    originals, restored = (key, latent), back.get_compressed_kv(0)[::-1]
    for (role, m), x, got in zip(methods.items(), originals, restored, strict=True):
        dispatch, spec = select("generic"), TensorSpec(tuple(x.shape), "float32")
        alone = m.decode(m.encode(x, role, dispatch), spec, role, dispatch)
        np.testing.assert_array_equal(xp.numpy(got), xp.numpy(alone))
        assert not np.array_equal(xp.numpy(got), xp.numpy(x))  # the codec is lossy here
    back.append(0, xp.asarray(states(1)))
    assert back.seq_len(0) == 10
    with pytest.raises(LayoutError, match="decompress_to_mla_cache"):
        compressor.decompress_kv_3d(compressed)


def test_a_lossless_swap_restores_keys_and_values(xp: Any) -> None:
    compressor = KVCacheCompressor(LowRank(ROPE), value_method=LowRank(RANK))
    cache = MlaCompressedKVCache([make(xp, norm=True)])
    cache.append(0, xp.asarray(states(9)))
    back = MlaCompressedKVCache(cache.layers)
    compressor.decompress_to_mla_cache(compressor.compress_mla_cache(cache), back)
    for got, expected in zip(back.get_kv(0), cache.get_kv(0), strict=True):
        close(xp, got, xp.numpy(expected), atol=1e-3)


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
    mla = MultiHeadLatentAttention(**weights(), rope=ROTATION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mla.norm_eps = 0.0  # type: ignore[misc]


def _compress(mla: MultiHeadLatentAttention, hidden: Any, positions: Any) -> Any:
    return mla.compress(hidden, positions)


def _restore(mla: MultiHeadLatentAttention, latent: Any, rope_key: Any) -> Any:
    return mla.restore(latent, rope_key)
