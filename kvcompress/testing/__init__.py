"""Help for testing what is built on kvcompress.

`kvcompress.testing.strategies` makes Hypothesis draw keys, values and methods (needs
``hypothesis``); `check_backend` checks a backend against the generic operations, `check_method` a
method; ``python -m kvcompress.testing.gpu`` checks and times the CUDA kernels.
"""

from kvcompress.testing.conformance import check_backend
from kvcompress.testing.methods import check_method

__all__ = ["check_backend", "check_method"]
