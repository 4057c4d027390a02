"""Codebooks: `nearest`, `lookup`, `encode_product` and `decode_product`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import takes
from kvcompress_cupy.launches import codebooks as launches
from kvcompress_cupy.launches.layout import CHANNELS
from kvcompress_cupy.operations.base import Kernels
from kvcompress_cupy.sources import WORDS


def _takes_nearest(x: Array, codebook: Array) -> bool:
    return _all_float32(x, codebook) and x.shape[1] > 0 and 0 < codebook.shape[0] < 2**31


def _takes_lookup(codes: Array, codebook: Array) -> bool:
    width = codebook.shape[1] * codebook.dtype.itemsize
    return (
        codes.dtype.kind in "iu"
        and codebook.dtype.itemsize >= 2
        and 0 < codebook.shape[0] < 2**31
        and 0 < width <= CHANNELS
    )


def _takes_encode_product(x: Array, *codebooks: Array) -> bool:
    return (
        _all_float32(x, *codebooks)
        and 0 < len(codebooks) <= launches.BOOKS
        and x.shape[-1] <= CHANNELS
    )


def _takes_decode_product(codes: Array, *codebooks: Array) -> bool:
    return (
        codes.dtype.name == "uint8"
        and _all_float32(*codebooks)
        and 0 < len(codebooks) <= launches.BOOKS
        and sum(codebook.shape[-1] for codebook in codebooks) <= CHANNELS
    )


class Codebooks(Kernels):
    """See `kvcompress.ops.kmeans` and `kvcompress.ops.product`."""

    @takes(_takes_nearest)
    def nearest(self, x: Array, codebook: Array) -> Array:
        """See `kvcompress.ops.nearest`; near ties may fall otherwise."""
        codes = self._runtime.empty((x.shape[0],), "int32", x)
        if codes.size:
            x, rows = self._rows(x)
            codebook = self._contiguous(codebook)
            launch = launches.nearest(rows, size=codebook.shape[0])
            self._runtime.launch(launch, x, codebook, codes)
        return codes

    @takes(_takes_lookup)
    def lookup(self, codes: Array, codebook: Array) -> Array:
        """See `kvcompress.ops.lookup`."""
        size, dim = codebook.shape
        out = self._runtime.empty((codes.shape[0], dim), dtype_name(codebook.dtype), codes)
        if out.size:
            codes, codebook = self._contiguous(codes), self._contiguous(codebook)
            row_bytes = dim * codebook.dtype.itemsize
            address = self._runtime.pointer(codebook)
            launch = launches.lookup(
                codes.shape[0],
                row_bytes=row_bytes,
                word=next(word for word in WORDS if row_bytes % word == address % word == 0),
                size=size,
                code_bytes=codes.dtype.itemsize,
            )
            self._runtime.launch(launch, codes, codebook, out)
        return out

    @takes(_takes_encode_product)
    def encode_product(self, x: Array, *codebooks: Array) -> Array:
        """See `kvcompress.ops.encode_product`; near ties may fall otherwise."""
        heads, tokens, _ = x.shape
        codes = self._runtime.empty((heads, tokens, len(codebooks)), "uint8", x)
        if codes.size:
            x, rows = self._rows(x)
            kept, books = self._books(codebooks)
            classes = np.array([launches.product_class(dim) for dim in books["dim"]])
            for dim in np.unique(classes):
                launch = launches.encode_product(
                    rows, books=books[classes == dim], columns=len(codebooks)
                )
                self._runtime.launch(launch, x, codes, reached=kept)
        return codes

    @takes(_takes_decode_product)
    def decode_product(self, codes: Array, *codebooks: Array) -> Array:
        """See `kvcompress.ops.decode_product`."""
        heads, tokens, _ = codes.shape
        channels = sum(codebook.shape[-1] for codebook in codebooks)
        out = self._runtime.empty((heads, tokens, channels), "float32", codes)
        if out.size:
            codes, rows = self._rows(codes)
            kept, books = self._books(codebooks)
            launch = launches.decode_product(rows, books=books, channels=channels)
            self._runtime.launch(launch, codes, out, reached=kept)
        return out

    def _books(self, codebooks: Sequence[Array]) -> tuple[Sequence[Array], np.ndarray[Any, Any]]:
        """Codebooks, copied where they have gaps, and what kernels have to know of them."""
        kept = [self._contiguous(codebook) for codebook in codebooks]
        books = np.zeros(len(kept), launches.CODEBOOK)
        books["centroids"] = [self._runtime.pointer(codebook) for codebook in kept]
        books["column"] = range(len(kept))
        books["dim"] = [codebook.shape[-1] for codebook in kept]
        books["start"] = np.cumsum(books["dim"]) - books["dim"]
        return kept, books


def _all_float32(*arrays: Array) -> bool:
    return all(array.dtype.name == "float32" for array in arrays)
