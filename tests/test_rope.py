from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

from kvcompress import DTypeError, NamespaceError, RoPE, SettingError, ShapeError

EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LONG = [0, 1, 7, 4095, 131_071, 1_000_000]
# The same positions throughout: JAX compiles every operation anew for every shape.
POSITIONS = np.array([*LONG, *np.random.default_rng(0).integers(0, 1_000_000, 58)], dtype=np.int32)
ROPES = [RoPE(2), RoPE(6, 1e7, interleaved=True), RoPE(64, 5e5), RoPE(64, 1e4, interleaved=True)]


def rotated(rope: RoPE, x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Float64 oracle: every pair is a complex number, turned by an exact angle."""
    out = np.empty(x.shape)
    half = rope.dim // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        turn = np.exp(1j * position * rope.theta ** (-2 * i / rope.dim))
        z = (x[..., a].astype(np.float64) + 1j * x[..., b].astype(np.float64)) * turn
        out[..., a], out[..., b] = z.real, z.imag
    return out


def pair_norms(rope: RoPE, x: np.ndarray) -> np.ndarray:
    """For every channel, the length of the pair it belongs to, in float64."""
    x = x.astype(np.float64)
    if rope.interleaved:
        return np.repeat(np.hypot(x[..., 0::2], x[..., 1::2]), 2, axis=-1)
    norms = np.hypot(*np.split(x, 2, axis=-1))
    return np.concatenate([norms, norms], axis=-1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_apply_is_the_oracle_up_to_float32_angles(xp: Any, rope: RoPE) -> None:
    x = normal(2, POSITIONS.size, rope.dim)
    got = xp.run(_apply, xp.asarray(x), xp.asarray(POSITIONS), rope=rope)
    bound = (POSITIONS[:, None] * 2.0**-22 + 8 * EPS["float32"]) * pair_norms(rope, x)
    assert (np.abs(xp.numpy(got) - rotated(rope, x, POSITIONS)) <= bound).all()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("rope", ROPES[1:3], ids=str)
def test_undo_is_the_reverse_of_apply(xp: Any, rope: RoPE, dtype: str) -> None:
    if dtype not in xp.dtypes:
        pytest.skip(f"{xp} has no {dtype}")
    x = cast(normal(1, POSITIONS.size, rope.dim), dtype)
    original, p = xp.asarray(x), xp.asarray(POSITIONS)
    back = xp.run(_undo, xp.run(_apply, original, p, rope=rope), p, rope=rope)
    assert (back.dtype, back.shape) == (original.dtype, original.shape)
    error = np.abs(xp.numpy(back).astype(np.float64) - x.astype(np.float64))
    # Each way rounds two channels to the dtype and turns the pair with float32 products.
    assert (error <= (4 * EPS[dtype] + 16 * EPS["float32"]) * pair_norms(rope, x) + 1e-7).all()


def test_position_zero_changes_nothing(xp: Any) -> None:
    x = normal(3, 5, 8)
    p = xp.asarray(np.zeros(5, dtype=np.int32))
    for interleaved in (False, True):
        got = xp.run(_apply, xp.asarray(x), p, rope=RoPE(8, interleaved=interleaved))
        np.testing.assert_array_equal(xp.numpy(got), x)


def test_positions_per_batch_broadcast_over_heads(xp: Any) -> None:
    rope, x = RoPE(8), normal(2, 3, 4, 8)
    p = np.array([[0, 1, 2, 3], [9, 8, 7, 6]], dtype=np.int32)
    got = xp.numpy(xp.run(_apply, xp.asarray(x), xp.asarray(p[:, None, :]), rope=rope))
    for b in range(2):
        alone = xp.run(_apply, xp.asarray(x[b]), xp.asarray(p[b]), rope=rope)
        np.testing.assert_allclose(got[b], xp.numpy(alone), rtol=0, atol=1e-6)


def test_the_logit_depends_on_the_distance_alone() -> None:
    rope, q, k = RoPE(64, 5e5), normal(1, 64, seed=1), normal(1, 64, seed=2)

    def logit(m: int, n: int) -> float:
        return float((rope.apply(q, np.array([m])) * rope.apply(k, np.array([n]))).sum())

    assert math.isclose(logit(117, 100), logit(1017, 1000), abs_tol=1e-2)
    assert not math.isclose(logit(117, 100), logit(118, 100), abs_tol=1e-2)


def test_no_token_and_no_mutation(xp: Any) -> None:
    rope = RoPE(8)
    empty = xp.run(_apply, xp.asarray(normal(2, 0, 8)), xp.asarray(np.zeros(0, "int32")), rope=rope)
    assert tuple(empty.shape) == (2, 0, 8)
    x, p = xp.asarray(normal(2, 3, 8)), xp.asarray(np.arange(3, dtype="int32"))
    xp.run(_apply, x, p, rope=rope)
    np.testing.assert_array_equal(xp.numpy(x), normal(2, 3, 8))


def test_wrong_arrays(xp: Any) -> None:
    rope, x = RoPE(8), xp.asarray(normal(2, 3, 8))
    p = xp.asarray(np.arange(3, dtype="int32"))
    with pytest.raises(ShapeError, match=r"\[\.\.\., seq_len, 8\], got shape \(2, 3, 6\)"):
        rope.apply(xp.asarray(normal(2, 3, 6)), p)
    with pytest.raises(ShapeError, match=r"broadcast to \(2, 3\), got shape \(4,\)"):
        rope.apply(x, xp.asarray(np.arange(4, dtype="int32")))
    with pytest.raises(ShapeError, match=r"broadcast to \(2, 3\), got shape \(5, 2, 3\)"):
        rope.undo(x, xp.asarray(np.zeros((5, 2, 3), dtype="int32")))
    with pytest.raises(DTypeError, match="positions must be integers"):
        rope.apply(x, xp.asarray(np.arange(3, dtype="float32")))
    with pytest.raises(DTypeError, match="got int32"):
        rope.apply(xp.asarray(np.zeros((2, 3, 8), dtype="int32")), p)
    with pytest.raises(NamespaceError):
        rope.apply(x, [0, 1, 2])


@pytest.mark.parametrize(
    "settings",
    [
        *({"dim": dim} for dim in (0, -2, 3, 8.0, "8", True, None)),
        *({"dim": 8, "theta": theta} for theta in (0.5, math.inf, math.nan, "1e4")),
        {"dim": 8, "interleaved": 1},
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        RoPE(**settings)


def test_hashable_copyable_picklable() -> None:
    rope = RoPE(64, 5e5, interleaved=True)
    assert pickle.loads(pickle.dumps(rope)) == copy.deepcopy(rope) == rope
    assert hash(copy.copy(rope)) == hash(rope)


@pytest.mark.library("torch")
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_llama_of_transformers(dim: int, theta: float) -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    k = torch.from_numpy(normal(1, 2, len(LONG), dim))
    p = torch.tensor(LONG)
    _, expected = llama.apply_rotary_pos_emb(k, k, *llama.LlamaRotaryEmbedding(config)(k, p[None]))
    torch.testing.assert_close(RoPE(dim, theta).apply(k, p), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(RoPE(dim, theta).undo(expected, p), k, rtol=0, atol=2e-6)


def _apply(x: Any, positions: Any, *, rope: RoPE) -> Any:
    return rope.apply(x, positions)


def _undo(x: Any, positions: Any, *, rope: RoPE) -> Any:
    return rope.undo(x, positions)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
