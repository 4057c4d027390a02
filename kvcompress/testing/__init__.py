"""Help for testing what is built on kvcompress.

`kvcompress.testing.strategies` makes Hypothesis draw keys, values and methods (needs
``hypothesis``); `kvcompress.testing.conformance` checks a backend against the generic operations;
``python -m kvcompress.testing.gpu`` checks and times the CUDA kernels.
"""
