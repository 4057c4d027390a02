"""RoPE against transformers: its modules, and the keys that its models cached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvcompress import RoPE
from kvcompress.errors import SettingError, UnsupportedModel

pytestmark = pytest.mark.library("torch")

CONTEXT, LONG = 4096, 131_072
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": CONTEXT}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": CONTEXT,
        "factor": LONG / CONTEXT,
        "short_factor": [1 + i / (2 * pairs) for i in range(pairs)],
        "long_factor": [1 + 60 * i / pairs for i in range(pairs)],
    }


PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 24, "beta_slow": 2},
    "yarn-attention": YARN | {"attention_factor": 0.8, "truncate": False},
    "llama3": LLAMA3,
    "longrope": longrope(32),
    "longrope-attention": longrope(32) | {"attention_factor": 1.5},
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.25},
}


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("length", [CONTEXT, 2 * LONG], ids=["short", "long"])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", PARAMETERS)
def test_modules(name: str, theta: float, length: int) -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=LONG,
        rope_parameters=PARAMETERS[name] | {"rope_theta": theta},
    )
    x = normal(1, 2, 64, 64)
    p = torch.linspace(0, length - 1, 64).round().to(torch.int64)
    module = LlamaRotaryEmbedding(config)
    expected, _ = apply_rotary_pos_emb(x, x, *module(x, p[None]))
    rope = RoPE.from_config(config)
    got = rope.apply(x, p, seq_len=length)
    # Up to four units in the last place of every frequency, whose powers PyTorch rounds its way.
    half = p[:, None] * module.inv_freq * 2.0**-21 + 2.0**-21
    bound = torch.cat([half, half], dim=-1) * norms(expected)
    assert ((got - expected).abs() <= bound).all()
    assert ((rope.undo(got, p, seq_len=length) - x).abs() <= 2.0**-21 * norms(x)).all()
    scale = (norms(got) / norms(x)).mean().item()
    assert scale == pytest.approx(module.attention_scaling, rel=1e-6)


def norms(x: torch.Tensor) -> torch.Tensor:
    """For every channel, the length of the pair it belongs to."""
    half = torch.hypot(*x.chunk(2, dim=-1))
    return torch.cat([half, half], dim=-1)


def test_dynamic_frequencies_are_those_of_the_length() -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )
    rope, p = RoPE.from_config(config), torch.tensor([CONTEXT])
    x = normal(1, 64)
    short, short2, long = (rope.apply(x, p, seq_len=n) for n in (10, CONTEXT, 2 * CONTEXT))
    torch.testing.assert_close(short, short2, rtol=0, atol=0)
    assert (short - long).abs().max() > 0.1


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, or layers hardly change their input
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}
SLIDING = {"sliding_window": 64}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32}
GPT = {"vocab_size": 64, "n_embd": 64, "n_head": 4, "n_layer": 4, "initializer_range": 0.3}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA4 = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ALL, NOPE_LAST = [16, 16, 16, 16], [16, 16, 16, 0]

# Per model: its own sizes, the rotated channels of every layer (0: none), whether interleaved.
MODELS: dict[str, tuple[dict[str, Any], list[int], bool]] = {
    "Llama": (SIZES | HEADS | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, ALL, False),
    "Qwen3": (SIZES | HEADS | {"rope_parameters": YARN | {"rope_theta": 1e6}}, ALL, False),
    "GPTNeoX": (SIZES, [4] * 4, False),
    "Phi": (SIZES, [8] * 4, False),
    "Phi3": (SIZES | {"rope_parameters": longrope(8) | {"rope_theta": 1e4}}, ALL, False),
    "StableLm": (SIZES, [4] * 4, False),
    "Persimmon": (SIZES, [8] * 4, False),
    "Nemotron": (SIZES, [8] * 4, False),
    "GPTJ": (GPT | {"rotary_dim": 8}, [8] * 4, True),
    "CodeGen": (GPT | {"rotary_dim": 8}, [8] * 4, True),
    "Falcon": (SIZES, ALL, False),
    "Cohere": (SIZES, ALL, True),
    "Cohere2": (SIZES | SLIDING, NOPE_LAST, True),
    "Ernie4_5": (SIZES | HEADS, ALL, True),
    "Glm": (SIZES | HEADS, [8] * 4, True),
    "Glm4": (SIZES | HEADS, [8] * 4, True),
    "Helium": (SIZES | HEADS, ALL, True),
    "Llama4Text": (SIZES | HEADS | EXPERTS, NOPE_LAST, True),
    "Gemma2": (SIZES | HEADS | SLIDING, ALL, False),
    "Gemma3Text": (SIZES | HEADS | SLIDING | {"layer_types": GEMMA4["layer_types"]}, ALL, False),
    "Gemma4Text": (SIZES | HEADS | SLIDING | GEMMA4, [16, 32] * 2, False),
    "SmolLM3": (SIZES, NOPE_LAST, False),
    "Exaone4": (SIZES | SLIDING, NOPE_LAST, False),
    "DeepseekV2": (SIZES | LATENT, [8] * 4, True),
    "DeepseekV3": (SIZES | LATENT, [8] * 4, False),
    "Bloom": (GPT, [0] * 4, False),
}


def config_of(name: str) -> Any:
    return getattr(transformers, f"{name}Config")(**MODELS[name][0])


@pytest.mark.parametrize("name", MODELS)
def test_cached_keys_of_one_token_repeated(name: str) -> None:
    """Such tokens see nothing but each other: without RoPE, all their keys are the same."""
    config = config_of(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.full((1, 40), 7), past_key_values=cache, use_cache=True)
    _, dims, interleaved = MODELS[name]
    for layer, dim in enumerate(dims):
        rope = RoPE.from_config(config, layer=layer)
        assert (0 if rope is None else rope.dim) == dim
        held = cache.layers[layer]
        # transformers caches the latent of DeepSeek as keys, the RoPE key as values.
        keys = held.values if name.startswith("Deepseek") else held.keys
        if rope is None:
            assert spread(keys) < 1e-5
            continue
        assert rope.interleaved == interleaved
        assert rope.head_dim == keys.shape[-1]
        assert spread(keys) > 0.1
        assert spread(rope.undo(keys, torch.arange(40), seq_len=40)) < 1e-5


def spread(keys: torch.Tensor) -> float:
    """Largest difference between tokens, relative to the largest key."""
    return ((keys - keys[..., :1, :]).abs().max() / keys.abs().max()).item()


def test_layers_of_gemma3_differ() -> None:
    config = config_of("Gemma3Text")
    local = RoPE.from_config(config, layer="sliding_attention")
    far = RoPE.from_config(config, layer="full_attention")
    assert (local.theta, far.theta) == (1e4, 1e6)
    assert [RoPE.from_config(config, layer=i) for i in range(4)] == [local, far, local, far]
    with pytest.raises(SettingError, match=r"pass layer=.*'sliding_attention'"):
        RoPE.from_config(config)
    with pytest.raises(SettingError, match="layer must be"):
        RoPE.from_config(config, layer=4)
    for name in ("Gemma3Text", "Gemma4Text"):
        with pytest.raises(SettingError, match="chunked_attention"):
            RoPE.from_config(config_of(name), layer="chunked_attention")


def test_text_part_of_multimodal_models() -> None:
    config = transformers.Qwen2VLConfig()
    rope = RoPE.from_config(config)
    assert (rope.dim, rope.theta) == (128, config.get_text_config().rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Llama", {"head_dim": 16, "rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("Qwen2", {"rope_theta": 1e6, "rope_scaling": {**YARN, "type": "yarn"}}),
        ("GPTNeoX", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
        ("Phi", {"partial_rotary_factor": 0.5, "rope_theta": 1e4}),
        (
            "Phi3",
            {
                "rope_theta": 1e4,
                "max_position_embeddings": LONG,
                "original_max_position_embeddings": CONTEXT,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": longrope(8)["short_factor"],
                    "long_factor": longrope(8)["long_factor"],
                },
            },
        ),
        ("DeepseekV3", {**LATENT, "rope_theta": 1e4, "rope_scaling": {**YARN, "mscale": 1.0}}),
        ("GPTJ", {**GPT, "rotary_dim": 8}),
    ],
)
def test_published_configurations_read_as_those_of_transformers(
    name: str, published: dict[str, Any]
) -> None:
    cls = getattr(transformers, f"{name}Config")
    published = ({} if name == "GPTJ" else SIZES) | published
    mapping = {"model_type": cls.model_type, **published}
    assert RoPE.from_config(mapping) == RoPE.from_config(cls(**published))


def test_gemma3_as_published() -> None:
    config = {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    cls = transformers.Gemma3TextConfig
    expected = cls(**{key: config[key] for key in config if key != "model_type"})
    for kind in ("sliding_attention", "full_attention"):
        assert RoPE.from_config(config, layer=kind) == RoPE.from_config(expected, layer=kind)


@pytest.mark.parametrize("name", ["DeepseekV4", "NanoChat", "RoFormer", "Ernie4_5_VLMoe"])
def test_models_that_rotate_otherwise(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(UnsupportedModel, match="RoPE of"):
        RoPE.from_config(config, layer=0)


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bloom", "Mpt"])
def test_models_without_rope(name: str) -> None:
    assert RoPE.from_config(getattr(transformers, f"{name}Config")(), layer=0) is None
    assert RoPE.from_config(transformers.FalconConfig(alibi=True)) is None
