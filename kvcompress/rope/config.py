"""What the configuration of a model says of its rotary embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from kvcompress.errors import SettingError, UnsupportedModel, check_integer
from kvcompress.rope.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
    yarn_magnitude,
)

Parameters: TypeAlias = Mapping[str, Any]

# No configuration says which channels make a pair, or which layers go without: the model's code
# does. These are the `model_type` of transformers 5.23, read there and tested against it.
_INTERLEAVED = {
    "blt_global_transformer",
    "blt_local_decoder",
    "blt_local_encoder",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "deepseek_v2",
    "ernie4_5",
    "ernie4_5_moe",
    "glm",
    "glm4",
    "glm4v_text",
    "glm_ocr_text",
    "gptj",
    "helium",
    "llama4_text",
    "moonshine",
    "moonshine_streaming",
}
_ONLY_SLIDING_LAYERS = {"afmoe", "cohere2", "flint"}
_ONLY_SLIDING_LAYERS_IF_ANY = {"exaone4", "exaone4_5_text", "exaone_moe", "kolibri1"}
_UNSUPPORTED = {
    "cohere2_moe": "which layers rotate depends on where the experts are",
    "deepseek_v4": "it rotates the last channels of a head, and compresses tokens",
    "ernie4_5_vl_moe_text": "its frequencies are in an order of their own",
    "nanochat": "it rotates the other way round",
    "roformer": "it rotates, but its configuration does not say so",
}


def read_rope(config: Any, layer: int | str | None) -> dict[str, Any] | None:
    """Arguments of the `RoPE` of one layer; None if its keys are not rotated.

    See `RoPE.from_config`.
    """
    config = _text_part(config)
    model = str(_get(config, "model_type", "a model without model_type"))
    if model in _UNSUPPORTED:
        raise UnsupportedModel(f"RoPE of {model}: {_UNSUPPORTED[model]}")
    index, kind = _locate(config, layer)
    config = _of_layer(config, layer)
    if not _rotates(config, model, index, kind):
        return None
    parameters = _parameters(config, index, kind)
    if parameters is None:
        return None
    head_dim = _head_dim(config, model)
    dim = _rotated_dim(config, parameters, head_dim)
    scaling = _scaling(config, parameters, model)
    if isinstance(scaling, ProportionalScaling):
        dim = head_dim  # its share of still pairs is among the frequencies
    return {
        "dim": dim,
        "theta": float(parameters["rope_theta"]),
        "interleaved": model in _INTERLEAVED,
        "head_dim": head_dim,
        "scaling": scaling,
    }


def _get(config: Any, name: str, default: Any = None) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _has(config: Any, name: str) -> bool:
    return name in config if isinstance(config, Mapping) else hasattr(config, name)


def _text_part(config: Any) -> Any:
    if callable(getattr(config, "get_text_config", None)):
        return config.get_text_config(decoder=True)
    return _get(config, "text_config", config)


def _of_layer(config: Any, layer: int | str | None) -> Any:
    """The configuration as one layer sees it, where layers differ in size (Gemma 4)."""
    if layer is None or not getattr(config, "is_heterogeneous", False):
        return config
    try:
        return config.per_layer_config[layer]
    except (KeyError, ValueError) as error:
        raise SettingError(f"layer={layer!r}: {error}") from error


def _locate(config: Any, layer: int | str | None) -> tuple[int | None, str | None]:
    """Index and type of the layer, as far as the caller or the configuration tell."""
    if layer is None or isinstance(layer, str):
        return None, layer
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise SettingError(f"layer must be an index, a layer type or None, got {layer!r}")
    count = _get(config, "num_hidden_layers", _get(config, "n_layer"))
    layer = check_integer("layer", layer, 0, None if count is None else count - 1)
    types = _get(config, "layer_types", ())
    return layer, types[layer] if layer < len(types) else None


def _rotates(config: Any, model: str, index: int | None, kind: str | None) -> bool:
    """Whether the layer rotates its keys, as far as a flag or the model's code decide it."""
    if _get(config, "alibi", False) or not _get(config, "use_mem_rope", True):
        return False
    if _has(config, "position_embedding_type"):
        return _get(config, "position_embedding_type") in {"rope", "rotary"}
    if _has(config, "no_rope_layers"):
        if not (flags := _get(config, "no_rope_layers")):
            raise UnsupportedModel(
                f"no_rope_layers of {model} is empty, which stands for a default: pass the "
                "configuration of transformers (AutoConfig), which holds it"
            )
        if index is None and not all(flags):
            raise SettingError(f"some layers of {model} have no RoPE: pass layer=, one's index")
        return bool(flags[index or 0])
    window = _get(config, "sliding_window")
    if model in _ONLY_SLIDING_LAYERS or (model in _ONLY_SLIDING_LAYERS_IF_ANY and window):
        if kind is None:
            raise SettingError(
                f"some layers of {model} have no RoPE: pass layer=, one's type, or its index where "
                "the configuration has layer_types"
            )
        return kind == "sliding_attention"
    return True


def _parameters(config: Any, index: int | None, kind: str | None) -> Parameters | None:
    """RoPE parameters of a layer type, `rope_theta` among them; None if it has none."""
    given = _get(config, "rope_parameters", _get(config, "rope_scaling", {}))
    types = set(_get(config, "layer_types", ()))
    nested = {
        name: value
        for name, value in given.items()
        if isinstance(value, Mapping) or (value is None and name in types)
    }
    if nested:
        given = _of_type(nested, kind)
        if given is None:
            return None
    elif _has(config, "rope_local_base_freq"):  # Gemma 3 as it was published
        if kind is None:
            raise SettingError("the layers differ in RoPE: pass layer=, a layer's index or type")
        if kind == "sliding_attention":
            given = {"rope_theta": _get(config, "rope_local_base_freq")}
    theta = _get(given, "rope_theta", _get(config, "rope_theta", _get(config, "rotary_emb_base")))
    if thetas := _get(config, "layer_rope_theta"):  # Granite with sliding windows, Muse
        if index is None and len(set(thetas)) > 1:
            raise SettingError("the layers differ in RoPE: pass layer=, a layer's index")
        theta = thetas[index or 0]
        if theta == 0:
            return None
    if theta is None and _get(config, "rotary_dim") and not given:
        theta = 10000.0  # a constant in GPT-J and CodeGen
    if theta is not None:
        return {**given, "rope_theta": theta}
    if isinstance(config, Mapping) or given:
        raise UnsupportedModel(
            "this configuration names no rope_theta: pass one of transformers (AutoConfig), which "
            "holds the model's defaults, or add it; a model without RoPE has nothing to undo"
        )
    return None


def _of_type(nested: Mapping[str, Parameters | None], kind: str | None) -> Parameters | None:
    if kind is not None and kind in nested:
        return nested[kind]
    first, *others = nested.values()
    if kind is None and all(other == first for other in others):
        return first
    raise SettingError(
        f"the layers differ in RoPE: pass layer=, a layer's index or one of "
        f"{', '.join(map(repr, nested))}, got {kind!r}"
    )


def _head_dim(config: Any, model: str) -> int:
    # Latent attention caches the rotated key apart from the latent it is concatenated to.
    latent = _get(config, "qk_rope_head_dim") if _get(config, "kv_lora_rank") else None
    if found := latent or _get(config, "head_dim"):
        return int(found)
    width = _get(config, "hidden_size", _get(config, "n_embd"))
    heads = _get(config, "num_attention_heads", _get(config, "n_head"))
    if not width or not heads:
        raise UnsupportedModel(
            f"the configuration of {model} names no head_dim, nor hidden_size and "
            "num_attention_heads, from which it would follow"
        )
    return int(width // heads)


def _rotated_dim(config: Any, parameters: Parameters, head_dim: int) -> int:
    share = _get(config, "partial_rotary_factor", _get(config, "rotary_pct"))
    share = _get(parameters, "partial_rotary_factor", share)
    if share is not None:
        return int(head_dim * share)
    if isinstance(config, Mapping) or not _get(config, "rope_parameters"):
        return int(_get(config, "rotary_dim", head_dim))  # GPT-J; MiniMax-M2 as it was published
    return head_dim


def _scaling(config: Any, parameters: Parameters, model: str) -> RopeScaling | None:
    kind = _get(parameters, "rope_type", _get(parameters, "type", "default"))

    def number(name: str) -> Any:
        value = _get(parameters, name)
        if value is None:
            raise UnsupportedModel(
                f"rope_type {kind!r} needs {name!r}, which {model} does not name"
            )
        return value

    match kind:
        case "default" | "mrope":
            return None
        case "linear":
            return LinearScaling(number("factor"))
        case "proportional":
            share = _get(parameters, "partial_rotary_factor", 1.0)
            return ProportionalScaling(share, _get(parameters, "factor", 1.0))
        case "dynamic":
            return DynamicScaling(number("factor"), _context(config, model))
        case "llama3":
            original = _original_context(config, parameters, model)
            low, high = number("low_freq_factor"), number("high_freq_factor")
            return Llama3Scaling(number("factor"), original, low, high)
        case "yarn":
            original = _original_context(config, parameters, model)
            factor = _get(parameters, "factor") or _context(config, model) / original
            return YarnScaling(
                factor,
                original,
                _yarn_attention(parameters, factor),
                _get(parameters, "beta_fast") or 32.0,
                _get(parameters, "beta_slow") or 1.0,
                _get(parameters, "truncate", True),
            )
        case "longrope" | "su":
            if _get(parameters, "short_mscale") is not None:
                raise UnsupportedModel(f"RoPE of {model}: short_mscale, as in Phi-3.5-MoE")
            original = _original_context(config, parameters, model)
            return LongRopeScaling(
                tuple(number("short_factor")),
                tuple(number("long_factor")),
                original,
                _longrope_attention(config, parameters, original, model),
            )
    raise UnsupportedModel(
        f"RoPE of {model}: rope_type {kind!r}; known are 'default', 'linear', 'dynamic', 'yarn', "
        "'llama3', 'longrope' and 'proportional'"
    )


def _original_context(config: Any, parameters: Parameters, model: str) -> int:
    for source in (config, parameters):
        if found := _get(source, "original_max_position_embeddings"):
            return int(found)
    return _context(config, model)


def _context(config: Any, model: str) -> int:
    found = _get(config, "max_position_embeddings")
    if found is None:
        raise UnsupportedModel(f"the configuration of {model} names no max_position_embeddings")
    return int(found)


def _yarn_attention(parameters: Parameters, factor: float) -> float | None:
    given = _get(parameters, "attention_factor")
    over, under = _get(parameters, "mscale"), _get(parameters, "mscale_all_dim")
    if given is None and over and under:
        return yarn_magnitude(factor, over) / yarn_magnitude(factor, under)
    return None if given is None else float(given)


def _longrope_attention(config: Any, parameters: Parameters, original: int, model: str) -> float:
    given = _get(parameters, "attention_factor")
    if given is not None:
        return float(given)
    factor = _get(parameters, "factor") or _context(config, model) / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
