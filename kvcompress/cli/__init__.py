"""The command ``kvcompress``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; without the extra ``cli``, say how to install it."""
    try:
        from kvcompress.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("kvcompress"):
            raise
        sys.exit(
            f"kvcompress: the command needs {error.name}, which is not installed here; "
            "install it with: python -m pip install 'kvcompress[cli]'"
        )
    app(prog_name="kvcompress")
