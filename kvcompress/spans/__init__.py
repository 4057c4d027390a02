"""Layers coded together: their rows, statistics, bases, and the entropy coder."""
