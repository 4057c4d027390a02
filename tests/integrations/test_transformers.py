"""Models of transformers, tiny and random: what is captured, replaced, scored; the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tokenizers
import torch
from click.testing import CliRunner, Result
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
)

from kvcompress import Calibration, CrossLayerCalibration, RoPE
from kvcompress.cli.app import app
from kvcompress.errors import ShapeError, UnsupportedModel
from kvcompress.evaluation.continuation import Continuation
from kvcompress.evaluation.metrics import attention, relative_error
from kvcompress.integrations.transformers import (
    LanguageModel,
    cached_kv,
    capture,
    load_model,
    record_attention,
    replace_kv,
)
from kvcompress.integrations.transformers.gradients import cache_gradients, draw

pytestmark = pytest.mark.library("torch")

PREFIX, SCORED = 40, 24
SIZES = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # large, or a random model hardly looks at its cache
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
APART = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}


def llama():
    config = LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16)
    return LlamaForCausalLM(config)


def gemma3():
    """One KV head of 256, a scale that is not its own, layers with a sliding window, QK-norm."""
    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=100,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config)


def gemma2():
    """Attends by "eager": the logits are capped."""
    config = Gemma2Config(
        **SIZES,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=1000,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Bytes are tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "<pad>", "<unk>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=[llama, gemma3, gemma2], ids=lambda f: f.__name__)
def lm(request) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(request.param().eval(), make_tokenizer(bos=False), "float16")


@pytest.fixture(scope="module")
def llama_lm() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(llama().eval(), make_tokenizer(bos=False), "float16")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, PREFIX + SCORED + 1)


@pytest.fixture(scope="module")
def continuation(lm, tokens):
    return Continuation(lm, tokens, prefix=PREFIX)


def logits_at_once(lm, tokens):
    with torch.no_grad():
        return lm.model(torch.as_tensor(tokens)[None], use_cache=False).logits[0]


def test_chunks():
    for bos, size in ((False, 10), (True, 9)):
        lm = LanguageModel(None, make_tokenizer(bos=bos), "float16")
        chunks = lm.chunks("x" + "abcdefghi" * 5, 10)
        assert chunks.shape == (46 // size, 10)
        assert chunks.dtype == np.int64
        assert (chunks[:, 0] == 256).all() == bos
        plain = lm.tokenizer("x" + "abcdefghi" * 5, add_special_tokens=False)["input_ids"]
        np.testing.assert_array_equal(chunks[:, 10 - size :].ravel(), plain[: size * len(chunks)])


def test_chunks_of_a_short_text_are_none():
    lm = LanguageModel(None, make_tokenizer(bos=True), "float16")
    assert lm.chunks("abc", 10).shape == (0, 10)


def test_capture_is_what_attention_reads(lm, tokens):
    """Keys, values and scaled queries give the output of the model's own attention."""
    if type(lm.model) is Gemma2ForCausalLM:
        pytest.skip("caps its logits, which the reference does not")
    outputs = {}
    layers = lm.model.base_model.layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: outputs.update({i: args[0][0]})
        )
        for i, layer in enumerate(layers)
    ]
    captured = capture(lm, tokens)
    for hook in hooks:
        hook.remove()
    assert list(captured) == list(range(len(layers)))
    for i, kvq in captured.items():
        k, v, q = (x[0].numpy() for x in kvq)
        assert k.shape[1] == v.shape[1] == q.shape[1] == len(tokens)
        if (
            getattr(lm.model.config, "layer_types", None)
            and "sliding" in (lm.model.config.layer_types[i])
        ):
            continue
        expected = outputs[i].reshape(len(tokens), *q.shape[::2]).numpy().swapaxes(0, 1)
        assert relative_error(expected, attention(q, k, v)) < 1e-5


def test_capture_agrees_with_the_cache(lm, tokens):
    captured = capture(lm, tokens)
    with torch.no_grad():
        cache = lm.model(torch.as_tensor(tokens)[None], use_cache=True).past_key_values
    for i, pair in cached_kv(cache).items():
        for held, seen in zip(pair, captured[i], strict=False):
            torch.testing.assert_close(held, seen[..., -held.shape[-2] :, :])


def test_recording_changes_nothing(lm, tokens):
    before = lm.model.config._attn_implementation
    plain = logits_at_once(lm, tokens)
    calls = []
    with record_attention(lm.model, calls.append):
        recorded = logits_at_once(lm, tokens)
    assert torch.equal(plain, recorded)
    assert [call.layer for call in calls] == list(range(lm.model.config.num_hidden_layers))
    assert lm.model.config._attn_implementation == before
    assert torch.equal(plain, logits_at_once(lm, tokens))
    assert len(calls) == lm.model.config.num_hidden_layers


def test_recording_ends_when_the_model_fails(lm):
    before = lm.model.config._attn_implementation

    def fail(call):
        raise RuntimeError(f"layer {call.layer}")

    with pytest.raises(RuntimeError, match="layer 0"), record_attention(lm.model, fail):
        logits_at_once(lm, [1, 2])
    assert lm.model.config._attn_implementation == before


def test_threads_record_and_run_one_model(llama_lm, tokens):
    inputs, alone = torch.as_tensor(tokens)[None], capture(llama_lm, tokens)
    logits = llama_lm.model(inputs).logits

    def recorded(_):
        captured = capture(llama_lm, tokens)
        pairs = (zip(captured[i], alone[i], strict=True) for i in alone)
        return all(torch.equal(a, b) for pair in pairs for a, b in pair)

    with ThreadPoolExecutor(4) as pool:
        records = [pool.submit(recorded, i) for i in range(24)]
        runs = [pool.submit(llama_lm.model, inputs) for _ in range(24)]
        assert all(record.result() for record in records)
        assert all(torch.equal(run.result().logits, logits) for run in runs)
    assert llama_lm.model.config._attn_implementation == "sdpa"


def test_recording_needs_a_known_attention(llama_lm):
    model = llama_lm.model
    recording = record_attention(model, print), record_attention(model, print)
    with pytest.raises(UnsupportedModel, match="kvcompress_sdpa"), recording[0], recording[1]:
        pass
    assert model.config._attn_implementation == "sdpa"


def test_original_cache_continues_the_text(lm, tokens, continuation):
    """Through the cache, masks and positions included, as if the text were read at once."""
    scores = continuation.score(continuation.kv)
    logits = logits_at_once(lm, tokens[:-1])[PREFIX:].double()
    expected = -torch.log_softmax(logits, -1)[np.arange(SCORED), tokens[PREFIX + 1 :]].numpy()
    assert np.abs(scores.original_nll - expected).max() < 0.02  # the cache is float16
    zeros = {i: tuple(torch.zeros_like(x) for x in kv) for i, kv in continuation.kv.items()}
    assert np.abs(continuation.score(zeros).nll - expected).max() > 0.2


def test_same_cache_same_model(continuation):
    for _ in range(2):  # the first must leave the original as it was
        score = continuation.score(continuation.kv)
        assert not score.kl.any()
        assert score.same_top.all()
        assert score.kl.shape == score.nll.shape == (SCORED,)
        np.testing.assert_array_equal(score.nll, score.original_nll)
        assert set(score.attention_error) == set(continuation.kv)
        assert max(score.attention_error.values()) == 0


def noisy(kv, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(x):
        return x + scale * torch.randn(x.shape, generator=generator).to(x.dtype)

    return {i: tuple(map(noise, pair)) for i, pair in kv.items()}


def test_score_of_another_cache(lm, tokens, continuation):
    """Against the model, run by hand on caches built by transformers, in float64."""
    kv = noisy(continuation.kv, 0.3)
    score = continuation.score(kv)

    def log_probabilities(kv):
        with torch.no_grad():
            first = lm.model(torch.as_tensor(tokens[:PREFIX])[None], use_cache=True)
            cache = first.past_key_values
            for i, (k, v) in kv.items():
                cache.layers[i].keys, cache.layers[i].values = k.float(), v.float()
            rest = torch.as_tensor(tokens[PREFIX:-1])[None]
            return torch.log_softmax(lm.model(rest, past_key_values=cache).logits[0].double(), -1)

    p, q = log_probabilities(continuation.kv), log_probabilities(kv)
    np.testing.assert_allclose(score.kl, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
    true = np.arange(SCORED), tokens[PREFIX + 1 :]
    np.testing.assert_allclose(score.nll, -q[true], atol=1e-4)
    np.testing.assert_allclose(score.original_nll, -p[true], atol=1e-4)
    np.testing.assert_array_equal(score.same_top, p.argmax(-1) == q.argmax(-1))
    assert score.kl.mean() > 1e-3


def test_attention_error(llama_lm, tokens):
    continuation = Continuation(llama_lm, tokens, prefix=PREFIX)
    kv = {**continuation.kv, 0: noisy(continuation.kv, 0.2)[0]}
    score = continuation.score(kv)
    assert score.attention_error[1] == 0
    # What the first layer reads does not depend on the cache.
    *new, q = (x[0].numpy() for x in capture(llama_lm, tokens[:-1])[0])
    original, changed = (
        [
            np.concatenate([held[0].float().numpy(), seen[:, PREFIX:]], axis=1)
            for held, seen in zip(pair, new, strict=True)
        ]
        for pair in (continuation.kv[0], kv[0])
    )
    q = q[:, PREFIX:]
    expected = relative_error(attention(q, *original), attention(q, *changed))
    assert score.attention_error[0] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_layers_with_a_window(tokens):
    torch.manual_seed(0)
    lm = LanguageModel(gemma3().eval(), make_tokenizer(bos=False), "bfloat16")
    continuation = Continuation(lm, tokens, prefix=PREFIX)
    assert {i: k.shape[-2] for i, (k, _) in continuation.kv.items()} == {0: 15, 1: PREFIX, 2: 15}
    assert continuation.partial == {0, 2}
    assert {k.dtype for k, _ in continuation.kv.values()} == {torch.bfloat16}


def test_replaced_caches_are_apart(llama_lm, tokens):
    with torch.no_grad():
        cache = llama_lm.model(torch.as_tensor(tokens)[None], use_cache=True).past_key_values
        held = cached_kv(cache)
        copied = replace_kv(cache, {i: (k + 1, v.half()) for i, (k, v) in held.items()})
        llama_lm.model(torch.as_tensor([[1, 2]]), past_key_values=copied)
    assert cache.get_seq_length() == len(tokens)
    assert copied.get_seq_length() == len(tokens) + 2
    for i, (k, v) in cached_kv(copied).items():
        assert k.dtype == v.dtype == torch.float32
        assert torch.equal(k[..., :-2, :], held[i][0] + 1)
        assert torch.equal(cached_kv(cache)[i][0], held[i][0])


def test_errors(llama_lm, tokens):
    continuation = Continuation(llama_lm, tokens, prefix=PREFIX)
    kv = dict(continuation.kv)
    with pytest.raises(ShapeError, match="layer 0 holds"):
        continuation.score({**kv, 0: tuple(x[..., 1:, :] for x in kv[0])})
    with pytest.raises(ShapeError, match=r"layers \[0, 1\], got \[0\]"):
        continuation.score({0: kv[0]})
    with pytest.raises(ShapeError, match="prefix must be from 1 to 63, got 64"):
        Continuation(llama_lm, tokens, prefix=len(tokens) - 1)
    with pytest.raises(UnsupportedModel, match="StaticLayer"):
        cached_kv(StaticCache(llama_lm.model.config, max_cache_len=10))


def test_a_layer_without_keys_is_left_out():
    assert cached_kv(DynamicCache(config=llama().config)) == {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model on disk, saved in bfloat16."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    llama().to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(bos=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8).tobytes())
    return path


@pytest.fixture(scope="module")
def calibration(directory, text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calibrations") / "tiny.cal"
    result = run("calibrate", directory, "--text", text, "-o", path, *CALIBRATE, "--tokens", 640)
    assert result.exit_code == 0, result.output
    return path


CALIBRATE = ("--length", 64, "--rows", 256)
EVALUATE = ("--prefix", 64, "--scored", 16, "--sequences", 2, "--sinks", 2, "--window", 8)


def run(*args: object) -> Result:
    return CliRunner(**APART).invoke(app, [str(arg) for arg in args])


def error(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_load_model(directory):
    lm = load_model(directory)
    assert lm.cache_dtype == "bfloat16"
    assert lm.model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert not lm.model.training


def test_calibrate_gathers_what_the_model_computes(directory, text, calibration):
    known = Calibration.load(calibration)
    assert known.layers == (0, 1)
    assert known.tokens == 10 * 60  # without the first 4 of every sequence
    assert known.provenance["sequences"] == 10
    lm = load_model(directory)
    chunks = lm.chunks(text.read_text(), 64)
    order = np.random.default_rng(0).permutation(len(chunks))[:10]
    rope = RoPE.from_config(lm.model.config, layer=1)
    assert known[1].rope == rope
    captured = (capture(lm, chunks[i])[1][0][0] for i in order)
    k = torch.cat([rope.undo(k, torch.arange(64))[:, 4:] for k in captured], dim=1).double()
    np.testing.assert_allclose(known[1].key_mean, k.mean(1).numpy(), rtol=1e-4, atol=1e-5)


def test_calibrate_goes_on(directory, text, calibration, tmp_path):
    path = tmp_path / "part.cal"
    for tokens in (250, 640, 100):
        result = run(
            "calibrate", directory, "--text", text, "-o", path, *CALIBRATE, "--tokens", tokens
        )
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["part.cal"]
    resumed, whole = Calibration.load(path), Calibration.load(calibration)
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.provenance == whole.provenance


def test_calibrate_refuses_another_source(directory, text, calibration, tmp_path):
    before = calibration.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("other" * 1000)
    for args, message in (
        (("--text", other, *CALIBRATE), "texts"),
        (("--text", text, "--length", 32, "--rows", 256), "length 64, not 32"),
        (("--text", text, "--length", 64, "--rows", 512), "rows 256, not 512"),
    ):
        assert message in error("calibrate", directory, "-o", calibration, *args)
    assert calibration.read_bytes() == before


def test_calibrate_bad_input(directory, text, tmp_path):
    path = tmp_path / "x.cal"
    few = ("calibrate", directory, "--text", text, "-o", path, *CALIBRATE)
    assert "--tokens must be at most 3008" in error(*few, "--tokens", 4000)
    assert "No such file" in error("calibrate", directory, "--text", "nowhere.txt", "-o", path)
    assert "no such file" in error("calibrate", "nowhere.gguf", "--text", text, "-o", path)
    assert "no such directory" in error(
        "calibrate", directory, "--text", text, "-o", tmp_path / "a" / "b"
    )
    path.write_bytes(b"something else")
    assert "is not a calibration" in error(*few)
    assert path.read_bytes() == b"something else"


def test_evaluate(directory, text, calibration, tmp_path):
    picture = tmp_path / "curve.png"
    result = run(
        *("evaluate", directory, "--text", text, "--calibration", calibration, *EVALUATE),
        *("--bits", "1,1.5,2,4,8", "--json", "--plot", picture),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert facts["dtype"] == "bfloat16"
    assert facts["calibrations"] == {"TransformCoding": Calibration.load(calibration).fingerprint}
    (report,) = facts["texts"]
    assert report["text"] == text.name
    assert report["perplexity"] > 1
    rows = {(r["method"], r["bits"]): r for r in report["results"]}
    assert set(rows) == {
        *(("GroupQuantization", bits) for bits in (2, 4, 8)),
        *(("RotatedQuantization", bits) for bits in (1, 2, 4, 8)),
        *(("TransformCoding", bits) for bits in (1, 1.5, 2, 4, 8)),
    }
    for method in ("GroupQuantization", "RotatedQuantization"):
        coarse, fine = rows[method, 2], rows[method, 8]
        assert fine["kl_mean"] < coarse["kl_mean"] / 10
        assert fine["attention_relative_error"] < coarse["attention_relative_error"] / 4
        assert fine["coded_bits_per_value"] > coarse["coded_bits_per_value"] + 5
    for row in rows.values():
        assert 0 < row["kl_mean"] < row["kl_p99"]
        assert 0 < row["top1_agreement"] <= 1
        assert row["bits_per_value"] > row["coded_bits_per_value"]  # a bfloat16 has 16
        assert 0 < row["bits_over_bound"] < row["coded_bits_per_value"]
    assert picture.read_bytes().startswith(b"\x89PNG")


METHOD = "--method", "CrossLayerTransform"


@pytest.mark.parametrize("kind", [llama, gemma3], ids=lambda f: f.__name__)
def test_cross_layer_from_texts_to_table(kind, text, tmp_path):
    """Layers together, from the texts to the table; sliding windows make groups of their own."""
    torch.manual_seed(0)
    model, path = tmp_path / "model", tmp_path / "model.cal"
    kind().save_pretrained(model)
    make_tokenizer(bos=True).save_pretrained(model)
    for tokens in (300, 1280):
        result = run(
            *("calibrate", model, "--text", text, "-o", path, *METHOD),
            *("--length", 64, "--tokens", tokens),
        )
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
    known = CrossLayerCalibration.load(path)
    assert known.tokens == 20 * 60
    expected = [(0, 1)] if kind is llama else [(0, 2), (1,)]
    assert [s.group.layers for s in known.statistics] == expected
    assert all(shape.rope for s in known.statistics for shape in s.group.shapes)
    lm = load_model(model)
    k = capture(lm, lm.chunks(text.read_text(), 64)[0])[0][0]
    assert known.statistics[0].group.shapes[0].heads == k.shape[1]
    result = run(
        *("evaluate", model, "--text", text, "--calibration", path, *EVALUATE),
        *("--methods", "CrossLayerTransform", "--bits", "0.5,2,4", "--json"),
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["calibrations"] == {"CrossLayerTransform": known.fingerprint}
    coarse, fine = facts["texts"][0]["results"]
    assert (coarse["bits"], fine["bits"]) == (0.5, 2)
    assert fine["kl_mean"] < coarse["kl_mean"] / 2
    assert coarse["coded_bits_per_value"] + 1 < fine["coded_bits_per_value"]
    assert "needs a --calibration" in error(
        "evaluate", model, "--text", text, *EVALUATE, "--methods", "CrossLayerTransform"
    )


@pytest.mark.parametrize("kind", [llama, gemma3], ids=lambda f: f.__name__)
def test_gradients_by_a_cache(kind, tmp_path):
    """Slopes of the log-likelihood when one number of the cache moves, and no other with it."""
    torch.manual_seed(0)
    kind().save_pretrained(tmp_path)
    make_tokenizer(bos=True).save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 60, 64)
    found = cache_gradients(lm, tokens, seed=5)
    assert all(x.requires_grad for x in lm.model.parameters())
    assert all(x.grad is None for x in lm.model.parameters())
    text = torch.as_tensor(tokens)[None]
    with torch.no_grad():
        cache = lm.model.base_model(text[:, :48], use_cache=True).past_key_values
        kv = cached_kv(cache)
        logits = lm.model(text[:, 48:], past_key_values=replace_kv(cache, kv)).logits[0]
        drawn = draw(logits, 5)

    def loss(layer, role, place, move):
        moved = {i: [x.clone() for x in pair] for i, pair in kv.items()}
        moved[layer][role][place] += move
        with torch.no_grad():
            logits = lm.model(text[:, 48:], past_key_values=replace_kv(cache, moved)).logits[0]
        return float(torch.nn.functional.cross_entropy(logits.double(), drawn, reduction="sum"))

    for layer, pair in found.items():
        for role, gradient in enumerate(pair):
            held = kv[layer][role].shape[2]
            first = 48 - held
            assert gradient.shape[2] == 64
            assert not gradient[:, :, :first].any()
            assert not gradient[:, :, 44:].any()
            assert gradient[:, :, first:44].any()
            at = int(gradient.abs().argmax())
            place = list(np.unravel_index(at, gradient.shape))
            slope = float(gradient.flatten()[at])
            place[2] -= first
            # Far from where a difference of float32 losses is noise.
            move = 0.02 / abs(slope) ** 0.5
            ends = [loss(layer, role, tuple(place), sign * move) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / (2 * move) == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_evaluate_table(directory, text):
    again = text.with_name("again.txt")
    again.write_text(text.read_text())
    result = run(
        *("evaluate", directory, "--text", text, "--text", again, *EVALUATE),
        *("--bits", "4", "--methods", "rotatedquantization,transformcoding"),
    )
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split("again.txt")
    assert first.count("bits=4") == second.count("bits=4") == 2
    assert "RotatedQuantization" in result.stdout
    assert "GroupQuantization" not in result.stdout
    assert "bits=4" in result.stdout
    assert "perplexity" in result.stdout


def test_evaluate_bad_input(directory, text):
    start = ("evaluate", directory, "--text", text)
    assert "unknown method 'Zip'" in error(*start, "--methods", "Zip")
    assert "numbers" in error(*start, "--bits", "2,x")
    assert "none of GroupQuantization" in error(
        *start, "--bits", "2.5", "--methods", "GroupQuantization"
    )
    assert "fewer than 100" in error(*start, *EVALUATE, "--sequences", 100)
    assert "no such file" in error(*start, "--calibration", "nowhere.cal")


def test_without_the_extra_it_says_what_to_install(text):
    code = (
        "import sys; sys.modules['transformers'] = None; from kvcompress.cli import main; "
        f"sys.argv = ['kvcompress', 'evaluate', 'x', '--text', {str(text)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "transformers" in line
    assert "pip install 'kvcompress[hf]'" in line
