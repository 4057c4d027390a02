"""One layer: its keys and values, each by its method; what a compressor comes down to."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.arrays import Array, dtype_name
from kvcompress.backend import Dispatcher
from kvcompress.compressed.kv import CompressedKV, CompressedTensor, KVLayout
from kvcompress.compressor.positions import Places
from kvcompress.compressor.tensor import decode, encode, readable, split_spec
from kvcompress.compressor.validation import check_finite
from kvcompress.errors import SettingError
from kvcompress.methods.base import Method, Role


@dataclass(frozen=True)
class LayerCodec:
    """How the keys and values of one layer are compressed and restored.

    Parameters
    ----------
    keys, values : Method or None
        Bound to their bits. Without a method, only what needs no more than it carries itself can be
        restored.
    sinks, window : int
        First and last tokens kept exact.
    nonfinite : {"raise", "saturate"}
    dispatch : Dispatcher
    """

    keys: Method | None
    values: Method | None
    sinks: int
    window: int
    nonfinite: str
    dispatch: Dispatcher

    def compress(self, k: Array, v: Array, layout: KVLayout, places: Places = 0) -> CompressedKV:
        """Compress keys and values that `check_pair` has passed, of tokens at `places`.

        Raises
        ------
        SettingError, NonFiniteError
            Before anything is computed.
        """
        dtype = dtype_name(k.dtype)
        tensors: tuple[tuple[Role, Method | None, Array], ...]
        tensors = ("keys", self.keys, k), ("values", self.values, v)
        read = []
        for role, method, x in tensors:
            if method is None:
                raise SettingError(
                    "a CacheMethod compresses layers together: use compress_cache and "
                    "decompress_cache"
                )
            # Settings that do not fit the shape raise here, before anything is computed.
            coded, _ = split_spec(x.shape, dtype, exact=self.sinks + self.window)
            method.encoded_spec(coded, role)
            read.append((role, method, readable(x, method, self.dispatch)))
        finite = [(r, m, check_finite(x, r, self.dispatch, self.nonfinite)) for r, m, x in read]
        keys, values = (
            encode(
                x,
                role,
                method,
                self.dispatch,
                sinks=self.sinks,
                window=self.window,
                places=places,
            )
            for role, method, x in finite
        )
        sinks = min(self.sinks, k.shape[-2])
        return CompressedKV(keys, values, layout, (tuple(k.shape), tuple(v.shape)), dtype, sinks)

    def decompress(self, compressed: CompressedKV) -> tuple[Array, Array]:
        """Restore keys and values of the shapes that were compressed.

        Raises
        ------
        CalibrationError
            If they were compressed with a calibration that the methods do not have.
        """

        def restored(
            tensor: CompressedTensor, known: Method | None, shape: tuple[int, ...]
        ) -> Array:
            return decode(tensor, known, self.dispatch, shape=shape, sinks=compressed.sinks)

        key_shape, value_shape = compressed.shape
        k = restored(compressed.keys, self.keys, key_shape)
        return k, restored(compressed.values, self.values, value_shape)
