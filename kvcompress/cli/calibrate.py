"""``kvcompress calibrate``: statistics of a model's keys, values and queries on texts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from kvcompress.arrays import HostArray
from kvcompress.calibration.calibration import Calibration
from kvcompress.cli.console import InputError, progress
from kvcompress.cli.model import load_model, read_text
from kvcompress.cli.options import text_option
from kvcompress.cross_layer import LayerGroup
from kvcompress.cross_layer.calibration import CrossLayerCalibration, layer_groups
from kvcompress.evaluation.rates import CALIBRATIONS
from kvcompress.methods import TransformCoding
from kvcompress.rope import RoPE

if TYPE_CHECKING:
    from kvcompress.integrations.transformers import LanguageModel

WEIGHED = 40_000
"""Tokens of which gradients are taken: more hardly change what is learned from them."""

SAVE_EVERY = 60.0
"""Seconds of work that an interruption may cost."""


@click.command()
@click.argument("model")
@text_option("Text to run the model on (repeatable: in equal parts).")
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
@click.option(
    "--method",
    type=click.Choice(list(CALIBRATIONS)),
    default=TransformCoding.identifier,
    show_default=True,
    help="The method that is to be calibrated.",
)
def calibrate(
    model: str,
    texts: tuple[Path, ...],
    output: Path,
    tokens: int,
    length: int,
    rows: int,
    method: str,
) -> None:
    """Gather what a method must know of a MODEL, from texts like those to come.

    For CrossLayerTransform, that is a covariance of everything that the cache holds of a token, of
    four bytes times the square of these numbers, and the gradients of the model's predictions by
    it.

    MODEL is a directory, a name on the Hugging Face hub, or a .gguf file. Needs the extra hf.
    The result is saved every minute; the same command goes on where it was interrupted, and one
    with more --tokens adds to what is there.

    \b
    Examples:
      kvcompress calibrate ./model --text prose.txt --text code.py -o model.cal
      kvcompress calibrate model.gguf --text prose.txt -o model.cal --tokens 100000
    """  # noqa: D301 (click keeps the lines after \b)
    contents = [read_text(path) for path in texts]
    source = {
        "model": Path(model).name,
        "texts": [hashlib.sha256(content.encode()).hexdigest() for content in contents],
        "length": length,
    }
    kind = CALIBRATIONS[method]
    calibration: Any = _started(output, {**source, "rows": rows}, kind)
    lm = None
    if calibration is None:
        if kind is Calibration:
            calibration = Calibration(rows=rows)
        else:
            lm = load_model(model)
            calibration = CrossLayerCalibration(_layer_groups(lm))
        calibration.provenance = {**source, "sequences": 0}
    count = math.ceil(tokens / length)
    done = calibration.provenance["sequences"]
    if done < count:
        lm = lm or load_model(model)
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


def _started(
    output: Path, source: dict[str, Any], kind: type[Calibration | CrossLayerCalibration]
) -> Calibration | CrossLayerCalibration | None:
    """Return the calibration in `output`, if there is one, and if it is of the same source."""
    if not output.parent.is_dir():
        raise InputError(f"{output}: no such directory: {output.parent}")
    if not output.exists():
        return None
    calibration = kind.load(output)
    known = dict(calibration.provenance)
    if isinstance(calibration, Calibration):
        known["rows"] = calibration.rows
    else:
        source = {name: value for name, value in source.items() if name != "rows"}
    for name, value in source.items():
        if known.get(name) != value:
            raise InputError(
                f"{output} is a calibration with {name} {known.get(name)}, not {value}; "
                "remove it, or write to another file"
            )
    return calibration


def _layer_groups(lm: LanguageModel) -> tuple[LayerGroup, ...]:
    from kvcompress.integrations.transformers import layer_shapes

    return layer_groups(layer_shapes(lm))


def _mixed(texts: Sequence[HostArray]) -> Iterator[HostArray]:
    """Sequences of all texts in turn; those of a text in an order that does not depend on more."""
    orders = [np.random.default_rng(i).permutation(len(text)) for i, text in enumerate(texts)]
    for places in zip_longest(*orders):
        for text, place in zip(texts, places, strict=True):
            if place is not None:
                yield text[place]


def _run(
    lm: LanguageModel,
    sequences: Iterator[HostArray],
    calibration: Calibration | CrossLayerCalibration,
    output: Path,
) -> None:
    from kvcompress.integrations.transformers import capture
    from kvcompress.integrations.transformers.gradients import cache_gradients

    saved = time.monotonic()
    for sequence in sequences:
        captured = capture(lm, sequence)
        if isinstance(calibration, CrossLayerCalibration):
            keys, values, _ = zip(*captured.values(), strict=True)
            gradients = None
            if calibration.weighed < WEIGHED:
                seed = calibration.provenance["sequences"]
                by_keys, by_values = zip(
                    *cache_gradients(lm, sequence, seed=seed).values(), strict=True
                )
                gradients = by_keys, by_values
            calibration.update(keys, values, gradients)
        else:
            for layer, (k, v, q) in captured.items():
                rope = RoPE.from_config(lm.model.config, layer=layer)
                calibration.update(layer, k, v, q, rope=rope)
        calibration.provenance["sequences"] += 1
        if time.monotonic() - saved > SAVE_EVERY:
            calibration.save(output)
            saved = time.monotonic()
    calibration.save(output)
