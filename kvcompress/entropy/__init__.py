"""Entropy coding: range asymmetric numeral systems, streams, and the model of coefficients."""
