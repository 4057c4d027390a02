"""``kvcompress calibrate``: statistics of a model's keys, values and queries on texts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvcompress.calibration import Calibration
from kvcompress.cli.console import InputError, progress
from kvcompress.cli.model import load_model, read_text
from kvcompress.metrics import HostArray

SAVE_EVERY = 60.0
"""Seconds of work that an interruption may cost."""


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Text to run the model on (repeatable: in equal parts).",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write."
)
@click.option("--tokens", type=click.IntRange(1), default=50_000, show_default=True)
@click.option(
    "--length", type=click.IntRange(16), default=1536, show_default=True, help="Of a sequence."
)
@click.option(
    "--rows",
    type=click.IntRange(256),
    default=8192,
    show_default=True,
    help="Tokens a layer whose keys and values are kept to train codebooks on.",
)
def calibrate(
    model: str, texts: tuple[Path, ...], output: Path, tokens: int, length: int, rows: int
) -> None:
    """Gather what `TransformCoding` must know of a MODEL, from texts like those to come.

    MODEL is a directory, a name on the Hugging Face hub, or a .gguf file. Needs the extra hf.
    The result is saved every minute; the same command goes on where it was interrupted, and one
    with more --tokens adds to what is there.

    \b
    Examples:
      kvcompress calibrate ./model --text prose.txt --text code.py -o model.cal
      kvcompress calibrate model.gguf --text prose.txt -o model.cal --tokens 100000
    """  # noqa: D301
    contents = [read_text(path) for path in texts]
    source = {
        "model": Path(model).name,
        "texts": [hashlib.sha256(content.encode()).hexdigest() for content in contents],
        "length": length,
    }
    calibration = _start(output, source, rows)
    count = math.ceil(tokens / length)
    done = calibration.provenance["sequences"]
    if done < count:
        lm = load_model(model)
        chunks = [lm.chunks(content, length) for content in contents]
        available = sum(map(len, chunks))
        if available < count:
            raise InputError(
                f"the texts make {available} sequences of {length} tokens; "
                f"--tokens must be at most {available * length}"
            )
        remaining = islice(_mixed(chunks), done, count)
        _run(lm, progress(remaining, count - done, "calibrating"), calibration, output)
    click.echo(
        f"{output}: {len(calibration.layers)} layers, {calibration.tokens:,} tokens of "
        f"{calibration.provenance['sequences']} sequences, "
        f"fingerprint {calibration.fingerprint[:12]}"
    )


def _start(output: Path, source: dict[str, Any], rows: int) -> Calibration:
    """Return the calibration in `output`, if it is of the same source, or an empty one."""
    if not output.parent.is_dir():
        raise InputError(f"{output}: no such directory: {output.parent}")
    if not output.exists():
        calibration = Calibration(rows=rows)
        calibration.provenance = {**source, "sequences": 0}
        return calibration
    calibration = Calibration.load(output)
    known = {**calibration.provenance, "rows": calibration.rows}
    for name, value in {**source, "rows": rows}.items():
        if known.get(name) != value:
            raise InputError(
                f"{output} is a calibration with {name} {known.get(name)}, not {value}; "
                "remove it, or write to another file"
            )
    return calibration


def _mixed(texts: Sequence[HostArray]) -> Iterator[HostArray]:
    """Sequences of all texts in turn; those of a text in an order that does not depend on more."""
    orders = [np.random.default_rng(i).permutation(len(text)) for i, text in enumerate(texts)]
    for places in zip_longest(*orders):
        for text, place in zip(texts, places, strict=True):
            if place is not None:
                yield text[place]


def _run(lm: Any, sequences: Iterator[HostArray], calibration: Calibration, output: Path) -> None:
    from kvcompress.integrations.transformers import capture

    saved = time.monotonic()
    for sequence in sequences:
        for layer, (k, v, q) in capture(lm, sequence).items():
            calibration.update(layer, k, v, q)
        calibration.provenance["sequences"] += 1
        if time.monotonic() - saved > SAVE_EVERY:
            _save(calibration, output)
            saved = time.monotonic()
    _save(calibration, output)


def _save(calibration: Calibration, output: Path) -> None:
    """Write the file, wholly or not at all."""
    part = output.with_name(f"{output.name}.part")
    try:
        calibration.save(part)
        part.replace(output)
    except OSError as error:
        raise InputError(f"{output}: {error.strerror or error}") from error
