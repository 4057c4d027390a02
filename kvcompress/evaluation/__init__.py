"""How good a codec is: errors of arrays, and what changed caches do to a model."""
