"""CUDA kernels for CuPy arrays, compiled when they are first used (needs CuPy 14.2)."""

from kvcompress_cupy.backend import CupyBackend

__all__ = ["CupyBackend", "backend"]

backend = CupyBackend()
