"""Models and texts for the commands that run a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.cli.console import InputError

if TYPE_CHECKING:
    from kvcompress.integrations.transformers import LanguageModel


def load_model(name: str) -> LanguageModel:
    """Load a model: a directory, a name on the hub, or a ``.gguf`` file.

    Raises
    ------
    InputError
        If there is no such model, or a package is missing.
    """
    quiet = not sys.stderr.isatty()
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read once, when tqdm is imported
    try:
        # Imported here: it takes seconds, which other commands need not wait for.
        from transformers.utils import logging

        from kvcompress.integrations import transformers
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("kvcompress"):
            raise
        raise InputError(
            f"running a model needs {error.name}; install it with: "
            "python -m pip install 'kvcompress[hf]'"
        ) from error
    if quiet:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    if Path(name).suffix == ".gguf" and not Path(name).is_file():
        raise InputError(f"{name}: no such file")
    try:
        return transformers.load_model(name)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error


def read_text(path: Path) -> str:
    """Content of a text file in UTF-8; other bytes become replacement characters."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
