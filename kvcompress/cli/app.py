"""The group of commands."""

from __future__ import annotations

from typing import Any

import click

import kvcompress
from kvcompress.cli.bench import bench
from kvcompress.cli.calibrate import calibrate
from kvcompress.cli.compare import compare
from kvcompress.cli.console import InputError
from kvcompress.cli.doctor import doctor
from kvcompress.cli.evaluate import evaluate
from kvcompress.errors import KVCompressError


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KVCompressError as error:
            raise InputError(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvcompress.__version__, prog_name="kvcompress")
def app() -> None:
    """Compress transformer KV caches, on any array library.

    \b
    Examples:
      kvcompress compare           every method on a sample of real keys and values
      kvcompress compare my.npz    the same on your own
      kvcompress bench             time and memory of every operation
      kvcompress doctor            what is installed and in use here
      kvcompress calibrate MODEL --text prose.txt -o model.cal
                                   gather what TransformCoding must know of a model
      kvcompress evaluate MODEL --text held-out.txt
                                   what compressed caches do to a model
    """  # noqa: D301 (click keeps the lines after \b)


app.add_command(compare)
app.add_command(bench)
app.add_command(doctor)
app.add_command(calibrate)
app.add_command(evaluate)
