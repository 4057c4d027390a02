"""``python -m kvcompress``: the command `kvcompress`."""

from kvcompress.cli import main

main()
