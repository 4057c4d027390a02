from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import RoPE
from kvcompress.errors import DTypeError, NamespaceError, SettingError, ShapeError, UnsupportedModel
from kvcompress.rope.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)

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


SCALINGS = [
    LinearScaling(8.0),
    ProportionalScaling(0.25, 2.0),
    YarnScaling(32.0, 4096),
    YarnScaling(4.0, 4096, 0.8, truncate=False),
    Llama3Scaling(8.0, 8192),
    LongRopeScaling((1.5,) * 32, (9.0,) * 32, 4096, 1.2),
    DynamicScaling(2.0, 4096),
]


def rate(scaling: RopeScaling, i: int, seq_len: int) -> float:
    """Radians per token of pair `i` of 32, theta being 1e4, in float64."""
    exact = 1e4 ** (-i / 32)
    match scaling:
        case LinearScaling(factor):
            return exact / factor
        case ProportionalScaling(_, factor):
            return exact / factor if i < 8 else 0.0
        case YarnScaling(factor=factor):
            # The pairs that turn 32 times and once in 4096 tokens.
            low, high = (32 * math.log(4096 / n / math.tau) / math.log(1e4) for n in (32, 1))
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            ramp = min(max((i - low) / (high - low), 0), 1)
            return exact * (ramp / factor + 1 - ramp)
        case Llama3Scaling(factor):
            turns = 8192 * exact / math.tau
            smooth = min(max((turns - 1) / 3, 0), 1)
            return exact * ((1 - smooth) / factor + smooth)
        case LongRopeScaling():
            return exact / (9.0 if seq_len > 4096 else 1.5)
        case DynamicScaling(factor):
            growth = factor * max(seq_len, 4096) / 4096 - (factor - 1)
            return (1e4 * growth ** (64 / 62)) ** (-i / 32)
    raise AssertionError(scaling)


@pytest.mark.parametrize("seq_len", [100, 20_000])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)
def test_scalings_are_their_formulas(xp: Any, scaling: RopeScaling, seq_len: int) -> None:
    rope = RoPE(64, 1e4, scaling=scaling)
    x, p = normal(1, 64, 64), np.linspace(0, seq_len - 1, 64).astype("int32")
    got = xp.numpy(xp.run(_apply, xp.asarray(x), xp.asarray(p), rope=rope, seq_len=seq_len))
    rates = np.array([rate(scaling, i, seq_len) for i in range(32)])
    z = (x[..., :32].astype(np.float64) + 1j * x[..., 32:]) * scaling.magnitude
    turned = z * np.exp(1j * p[:, None] * rates)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    slack = p[:, None] * np.concatenate([rates, rates]) * 2.0**-20 + 2.0**-20
    assert (np.abs(got - expected) <= slack * scaling.magnitude * pair_norms(rope, x)).all()
    back = xp.run(_undo, xp.asarray(got), xp.asarray(p), rope=rope, seq_len=seq_len)
    assert (np.abs(xp.numpy(back) - x) <= 2.0**-20 * pair_norms(rope, x)).all()


def test_magnitudes() -> None:
    assert YarnScaling(32.0, 4096).magnitude == 0.1 * math.log(32) + 1
    assert YarnScaling(1.0, 4096).magnitude == 1
    assert YarnScaling(32.0, 4096, 0.8).magnitude == 0.8
    assert LinearScaling(8.0).magnitude == 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_leaves_the_other_channels(xp: Any, interleaved: bool) -> None:
    x, p = normal(2, 5, 24), np.arange(5, dtype="int32")
    rope = RoPE(8, interleaved=interleaved, head_dim=24)
    got = xp.numpy(xp.run(_apply, xp.asarray(x), xp.asarray(p), rope=rope))
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
    part = RoPE(8, interleaved=interleaved)
    expected = xp.run(_apply, xp.asarray(x[..., :8]), xp.asarray(p), rope=part)
    np.testing.assert_allclose(got[..., :8], xp.numpy(expected), rtol=0, atol=1e-6)


@given(
    st.integers(1, 8).map(lambda n: 2 * n),
    st.integers(0, 5),
    st.sampled_from([1.0, 1e4, 5e5, 1e7]),
    st.booleans(),
    st.lists(st.integers(0, 1_000_000), max_size=5),
)
def test_norms_last_and_undo_reverses(
    dim: int, rest: int, theta: float, interleaved: bool, positions: list[int]
) -> None:
    rope = RoPE(dim, theta, interleaved, dim + rest)
    x, p = normal(2, len(positions), dim + rest), np.array(positions, dtype=np.int64)
    turned = rope.apply(x, p)
    lengths = pair_norms(RoPE(dim, interleaved=interleaved), x[..., :dim])
    now = pair_norms(RoPE(dim, interleaved=interleaved), turned[..., :dim])
    np.testing.assert_allclose(now, lengths, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(rope.undo(turned, p), x, rtol=0, atol=2e-6)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_undone_keys_give_logits_of_any_distance(query: int, key: int, moved: int) -> None:
    """What a cache needs to place keys elsewhere: undo at one position, apply at another."""
    rope, q, k = RoPE(16, 1e4, scaling=LinearScaling(4.0)), normal(1, 16), normal(1, 16, seed=1)
    cached = rope.apply(k, np.array([key]))
    elsewhere = rope.apply(rope.undo(cached, np.array([key])), np.array([key + moved]))
    logit = (rope.apply(q, np.array([query])) * cached).sum()
    same = (rope.apply(q, np.array([query + moved])) * elsewhere).sum()
    assert math.isclose(logit, same, abs_tol=1e-2)


def test_frequencies_that_depend_on_the_length_need_it() -> None:
    x, p = normal(3, 64), np.arange(3)
    for scaling in (DynamicScaling(2.0, 64), LongRopeScaling((1.0,) * 32, (2.0,) * 32, 64)):
        rope = RoPE(64, scaling=scaling)
        assert rope.depends_on_length
        with pytest.raises(SettingError, match="pass seq_len="):
            rope.apply(x, p)
        with pytest.raises(SettingError, match="seq_len must be an integer >= 1, got 0"):
            rope.undo(x, p, seq_len=0)
    assert not RoPE(64).depends_on_length


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearScaling(0.0),
        lambda: LinearScaling(math.inf),
        lambda: LinearScaling("8"),
        lambda: ProportionalScaling(1.5),
        lambda: DynamicScaling(2.0, 0),
        lambda: RoPE(2, scaling=DynamicScaling(2.0, 64)),
        lambda: YarnScaling(4.0, 4096.0),
        lambda: YarnScaling(4.0, 4096, attention_factor=-1.0),
        lambda: YarnScaling(4.0, 4096, beta_fast=0),
        lambda: RoPE(8, 1.0, scaling=YarnScaling(4.0, 4096)),
        lambda: Llama3Scaling(8.0, 8192, low_freq_factor=4.0),
        lambda: LongRopeScaling([1.0], (1.0,), 4096),
        lambda: LongRopeScaling((1.0,), (-1.0,), 4096),
        lambda: RoPE(8, scaling=LongRopeScaling((1.0,) * 4, (1.0,) * 3, 4096)),
        lambda: RoPE(8, scaling="yarn"),
        lambda: RoPE(8, head_dim=6),
        lambda: RoPE(8, head_dim=8.0),
    ],
)
def test_wrong_scalings(make: Callable[[], Any]) -> None:
    with pytest.raises(SettingError):
        make()


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5}
SCALED = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("kind", [dict, lambda c: SimpleNamespace(**c)], ids=["dict", "object"])
def test_configurations(kind: Callable[[dict[str, Any]], Any]) -> None:
    def read(layer: Any = None, **more: Any) -> RoPE | None:
        return RoPE.from_config(kind(LLAMA | more), layer=layer)

    assert read() == RoPE(16, 5e5)
    assert read(head_dim=32) == RoPE(32, 5e5)
    assert read(partial_rotary_factor=0.5) == RoPE(8, 5e5, head_dim=16)
    assert read(rope_scaling=SCALED) == RoPE(16, 5e5, scaling=LinearScaling(4.0))
    assert read(rope_parameters={**SCALED, "rope_theta": 1e6}).theta == 1e6
    assert read(model_type="cohere") == RoPE(16, 5e5, interleaved=True)
    assert read(text_config=kind(LLAMA | {"rope_theta": 7e5})) == RoPE(16, 7e5)
    assert read(alibi=True) is None
    assert read(no_rope_layers=[1, 0], layer=1) is None
    assert read(no_rope_layers=[1, 0], layer=0) == RoPE(16, 5e5)
    assert read(layer_rope_theta=[0, 1e6], layer=0) is None
    assert read(layer_rope_theta=[0, 1e6], layer=1) == RoPE(16, 1e6)
    layers = {"layer_types": ["a", "b", "c"]}
    nested = layers | {"rope_parameters": {"a": {"rope_theta": 1e4}, "b": SCALED, "c": None}}
    assert read(layer=0, **nested) == read(layer="a", **nested) == RoPE(16, 1e4)
    assert read(layer=1, **nested) == RoPE(16, 5e5, scaling=LinearScaling(4.0))
    assert read(layer=2, **nested) is None


@pytest.mark.parametrize(
    ("more", "layer", "error", "match"),
    [
        ({"rope_scaling": {"type": "axial"}}, None, UnsupportedModel, "rope_type 'axial'"),
        ({"rope_scaling": {"type": "linear"}}, None, UnsupportedModel, "needs 'factor'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 0, UnsupportedModel, "names no max"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 0, UnsupportedModel, "names no max"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, 0, SettingError, "factor must be"),
        ({"rope_theta": None}, None, UnsupportedModel, "names no rope_theta"),
        ({"hidden_size": None}, None, UnsupportedModel, "names no head_dim"),
        ({"no_rope_layers": [1, 0]}, None, SettingError, "pass layer="),
        ({"no_rope_layers": []}, 0, UnsupportedModel, "no_rope_layers of llama is empty"),
        ({"layer_rope_theta": [0, 1e6]}, None, SettingError, "pass layer="),
        ({"rope_local_base_freq": 1e4}, None, SettingError, "pass layer="),
        ({"model_type": "cohere2"}, None, SettingError, "pass layer="),
        ({"model_type": "nanochat"}, None, UnsupportedModel, "the other way round"),
        ({"num_hidden_layers": 2}, 2, SettingError, "layer must be an integer from 0 to 1, got 2"),
        ({}, 1.0, SettingError, "layer must be an index"),
        ({}, -1, SettingError, "layer must be"),
    ],
    ids=str,
)
def test_wrong_configurations(more: Any, layer: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        RoPE.from_config(LLAMA | more, layer=layer)


def _apply(x: Any, positions: Any, *, rope: RoPE, seq_len: int | None = None) -> Any:
    return rope.apply(x, positions, seq_len=seq_len)


def _undo(x: Any, positions: Any, *, rope: RoPE, seq_len: int | None = None) -> Any:
    return rope.undo(x, positions, seq_len=seq_len)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
