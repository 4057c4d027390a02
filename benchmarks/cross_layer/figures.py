"""Pictures, times and the comparison of docs/cross-layer.md.

After ``python benchmarks/evaluation/measure.py full --work WORK``, whose calibrations it reads:
``python benchmarks/cross_layer/figures.py WORK``. Takes about ten minutes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure

from kvcompress import (
    Calibration,
    CrossLayerCalibration,
    CrossLayerTransform,
    KVCacheCompressor,
    plan,
)
from kvcompress.cross_layer.training import fit_basis, train_layer_group
from kvcompress.entropy.context_model import LOW_BITS
from kvcompress.evaluation.continuation import Continuation
from kvcompress.evaluation.scoring import Row, Tally, result, score
from kvcompress.integrations.transformers import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
from measure import DOCS, TEXTS, store, weights
from measure import HERE as QUALITY

PREFIX, SCORED = 1536, 512
RATES = (0.1, 0.2, 0.4)
SCOPES = {"head": "#E69F00", "layer": "#0072B2", "model": "#009E73"}
TITLE = {"fontsize": 10}


def main() -> None:
    """Make all of it."""
    work = Path(sys.argv[1])
    joint = CrossLayerCalibration.load(work / "cross_layer.cal")
    calibration = Calibration.load(work / "calibrated.cal")
    lm = load_model(weights())
    found = json.loads((QUALITY / "cross_layer.json").read_text())
    layers = json.loads((QUALITY / "calibrated.json").read_text())
    (statistics,) = joint.statistics
    basis = fit_basis(statistics)
    codes = {bits: train_layer_group(statistics, bits, basis=basis) for bits in RATES}
    facts = {"head": heads(lm, calibration), "times": times(lm, codes)}
    store("../cross_layer/figures", facts)
    spectra(statistics, basis)
    components(codes)
    curves(facts["head"], layers, found)
    page = DOCS / "cross-layer.md"
    fill(page, "equal", equal_quality(layers, found))
    fill(page, "times", times_table(facts["times"]))


def heads(lm, calibration) -> list[dict]:
    """`TransformCoding` with spans of a head: bits and KL on every text."""
    options = {"sinks": 4, "window": 128}
    rows = []
    for bits in (1.5, 2, 3, 4):
        planned = plan(calibration, bits=bits, scope="head", **options)
        rows.append(Row("head", bits, planned.__getitem__))
    texts = []
    for title, path in TEXTS.items():
        chunks, tallies = lm.chunks(path.read_text(), PREFIX + SCORED + 1), [Tally() for _ in rows]
        middle = chunks[len(chunks) // 2][None]
        for _ in score(lm, middle, PREFIX, rows, tallies):
            pass
        results = [result(*pair) for pair in zip(rows, tallies, strict=True)]
        points = [{"bits": r.coded_bits_per_value, "kl": r.kl_mean} for r in results]
        texts.append({"text": title, "results": points})
    return texts


def times(lm, codes) -> dict:
    """Seconds of a prefill, and of compressing and restoring its cache, in turn; medians."""
    tokens = lm.chunks(TEXTS["English"].read_text(), PREFIX + 2)[0]
    seconds: dict[str, list[float]] = {}
    compressors = {
        bits: KVCacheCompressor(CrossLayerTransform(code), sinks=4, window=128)
        for bits, code in codes.items()
    }
    sizes = {}
    for turn in range(6):
        marks = [("", time.perf_counter())]
        continuation = Continuation(lm, tokens, prefix=PREFIX)
        keys, values = zip(*continuation.kv.values(), strict=True)
        marks.append(("", time.perf_counter()))
        prefill(lm, tokens)
        marks.append(("prefill", time.perf_counter()))
        for bits, compressor in compressors.items():
            compressed = compressor.compress_cache(keys, values)
            marks.append((f"compress {bits}", time.perf_counter()))
            compressor.decompress_cache(compressed)
            marks.append((f"restore {bits}", time.perf_counter()))
            sizes[bits] = sum(code.nbytes for code in compressor.method.groups)
        for (_, start), (name, end) in pairwise(marks):
            if name and turn:
                seconds.setdefault(name, []).append(end - start)
    model = lm.nbytes
    return {
        "seconds": {name: median(x) for name, x in seconds.items()},
        "code_megabytes": {str(bits): size / 1e6 for bits, size in sizes.items()},
        "model_megabytes": model / 1e6,
    }


def prefill(lm, tokens) -> None:
    """Let the model read what it would have to read, were the cache not kept."""
    with torch.no_grad():
        lm.model.base_model(torch.as_tensor(tokens[None, :PREFIX]), use_cache=True)


def spectra(statistics, basis) -> None:
    """Draw how fast the variances of components fall, if channels are taken together."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    covariance = statistics.metric.sandwich(statistics.covariance())
    parts = {"head": [], "layer": []}
    for shape, columns in zip(statistics.group.shapes, statistics.group.columns, strict=True):
        parts["layer"].append(np.arange(columns.start, columns.stop))
        starts, of_heads = columns.start, [[] for _ in range(shape.heads)]
        for heads, dim in shape.groups:
            for head in range(heads):
                of_heads[head].append(starts + head * dim + np.arange(dim))
            starts += heads * dim
        parts["head"] += [np.concatenate(x) for x in of_heads]
    found = {
        name: np.concatenate([np.linalg.eigvalsh(covariance[np.ix_(i, i)]) for i in places])
        for name, places in parts.items()
    }
    total = float(np.trace(covariance))
    del covariance
    found["model"] = basis.variances
    for name, variances in found.items():
        falling = np.sort(variances)[::-1]
        left = 1 - np.cumsum(falling, dtype=np.float64) / total
        share = (1 + np.arange(len(left))) / statistics.group.width
        axes.plot(share, left, color=SCOPES[name], label=f"of a {name}")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1)
    axes.set_xlim(0, 0.6)
    axes.set_xlabel("components kept, per number")
    axes.set_ylabel("share of the weighed variance that is lost")
    axes.legend(frameon=False)
    save(figure, axes, "cross-layer-spectrum.png")


def components(codes) -> None:
    """Draw what every component of a token costs."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = ("#56B4E9", "#0072B2", "#CC79A7")
    for (bits, code), color in zip(codes.items(), colors, strict=True):
        frequencies = code.frequencies.astype(np.float64) / 2**15
        entropy = -np.sum(frequencies * np.log2(frequencies), axis=1)
        cost = (entropy + LOW_BITS)[code.classes]
        axes.plot(1 + np.arange(len(cost)), cost, color=color, label=f"{bits:g} bits a value")
    axes.set_xscale("log")
    axes.set_xlabel(f"component, of {code.group.width:,}")
    axes.set_ylabel("bits a token, of usual tokens")
    axes.legend(frameon=False)
    save(figure, axes, "cross-layer-components.png")


def curves(head, layers, model) -> None:
    """Draw KL against bits for spans of a head, of a layer, of the model."""
    figure = Figure(figsize=(12.8, 4), layout="constrained")
    panels = figure.subplots(1, len(TEXTS), sharey=True)
    for i, axes in enumerate(panels):
        lines = {
            "head": [(r["bits"], r["kl"]) for r in head[i]["results"]],
            "layer": points(layers, i, "TransformCoding"),
            "model": points(model, i, "CrossLayerTransform"),
        }
        for name, line in lines.items():
            axes.plot(
                *zip(*sorted(line), strict=True), color=SCOPES[name], marker="o", label=f"a {name}"
            )
        rotated = sorted(points(layers, i, "RotatedQuantization"))
        axes.plot(*zip(*rotated, strict=True), color="0.6", marker="v", label="none, rotated")
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 4], labels=["0.1", "0.2", "0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.set_title(list(TEXTS)[i], **TITLE)
        axes.set_xlabel("coded bits per value")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL divergence, nats per token")
    panels[0].legend(frameon=False, title="taken together:")
    figure.savefig(DOCS / "_static" / "cross-layer-kl.png", dpi=150)


def save(figure, axes, name: str) -> None:
    """Write a picture."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "_static" / name, dpi=150)


def points(facts: dict, text: int, method: str) -> list[tuple[float, float]]:
    """Bits and KL of a method on a text."""
    rows = facts["texts"][text]["results"]
    return [(r["coded_bits_per_value"], r["kl_mean"]) for r in rows if r["method"] == method]


def equal_quality(layers: dict, model: dict) -> str:
    """Table of the bits of every method at the KL of `CrossLayerTransform`, between logarithms."""
    others = ("TransformCoding", "RotatedQuantization", "GroupQuantization")
    lines = [
        "text | KL | CrossLayerTransform | " + " | ".join(others) + " | fewer",
        "--|" * 6 + "--",
    ]
    for i, title in enumerate(TEXTS):
        for bits, kl in points(model, i, "CrossLayerTransform"):
            row = [at(sorted(points(layers, i, name)), kl) for name in others]
            if math.isnan(row[0]):  # the best of them was not measured there
                continue
            cells = ["" if math.isnan(x) else f"{x:.2f}" for x in row]
            cells.append(f"{np.nanmin(row) / bits:.1f}x")
            lines.append(f"{title} | {kl:.4f} | {bits:.2f} | " + " | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def at(line: list[tuple[float, float]], kl: float) -> float:
    """Bits at which a line from many to few nats crosses a divergence; NaN where it does not."""
    bits, logs = (np.array(x) for x in zip(*((b, -math.log(k)) for b, k in line), strict=True))
    return float(np.interp(-math.log(kl), logs, bits, left=math.nan, right=math.nan))


def times_table(facts: dict) -> str:
    """Seconds beside the prefill's, and sizes beside the model's, as a table."""
    seconds, prefill = facts["seconds"], facts["seconds"]["prefill"]
    lines = ["bits | compress | restore | codes, MB | of the model", "--|" * 4 + "--"]
    for bits, size in facts["code_megabytes"].items():
        shares = (f"{seconds[f'{what} {bits}'] / prefill:.2f}" for what in ("compress", "restore"))
        part = 100 * size / facts["model_megabytes"]
        lines.append(f"{bits} | " + " | ".join(shares) + f" | {size:.1f} | {part:.1f} %")
    return "\n".join(f"| {line} |" for line in lines)


def fill(page: Path, name: str, content: str) -> None:
    """Write a table into a page, between its marks."""
    before, mark, after = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, rest = after.partition("<!-- end -->")
    page.write_text(f"{before}{mark}{content}\n{end}{rest}")


if __name__ == "__main__":
    main()
