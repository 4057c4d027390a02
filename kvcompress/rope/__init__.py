"""Rotary embeddings, done and undone, with the scalings that models use."""

from kvcompress.rope.embedding import RoPE
from kvcompress.rope.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)

__all__ = [
    "DynamicScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ProportionalScaling",
    "RoPE",
    "RopeScaling",
    "YarnScaling",
]
