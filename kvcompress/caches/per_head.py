"""Latent attention head by head: each key and each value becomes a latent, and comes back."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from kvcompress.arrays import Array, astype, dtype_name, pytree, register_pytrees
from kvcompress.caches.projections import check_like, check_projections
from kvcompress.errors import SettingError, ShapeError, check_integer


@pytree(
    data=("down_proj", "up_proj", "rope_key", "value_down_proj", "value_up_proj"),
    meta=("num_heads",),
)
@dataclass(frozen=True, eq=False)
class PerHeadLatentAttention:
    """Projections of the keys and values of every head to latents, and back.

    The key of a token in a head becomes the latent ``key @ down_proj`` and comes back as
    ``latent @ up_proj + latent @ rope_key``; its value becomes ``value @ value_down_proj`` and
    comes back as ``latent @ value_up_proj``. All heads share the projections. Products are float32
    inside. A JAX pytree: `compress` and `restore` work inside ``jax.jit``.

    Parameters
    ----------
    down_proj : array ``[head_dim, latent_dim]``
        Key to latent; also value to latent, unless `value_down_proj` is given.
    up_proj : array ``[latent_dim, head_dim]``
        Latent to key; also latent to value, unless `value_up_proj` is given.
    rope_key : array ``[latent_dim, head_dim]``, optional
        Latent to what is added to the restored key. Nothing is added to values.
    num_heads : int
        Heads of keys and values (KV heads).
    value_down_proj : array ``[value_head_dim, value_latent_dim]``, optional
        Value to latent. Either both projections of values are given or none.
    value_up_proj : array ``[value_latent_dim, value_head_dim]``, optional
        Latent to value.

    Notes
    -----
    All arrays are of one library, dtype (float16, bfloat16 or float32) and device. `compress`,
    `restore` and `MlaCompressedKVCache` check that; construction cannot, because JAX constructs
    it from tracers.
    """

    down_proj: Array
    up_proj: Array
    rope_key: Array | None = None
    _: KW_ONLY
    num_heads: int
    value_down_proj: Array | None = None
    value_up_proj: Array | None = None

    def __post_init__(self) -> None:
        register_pytrees()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled arrays may be the first thing of JAX in this process.
        self.__dict__.update(state)
        register_pytrees()

    @property
    def head_dim(self) -> int:
        """Width of a key."""
        return int(self.down_proj.shape[0])

    @property
    def latent_dim(self) -> int:
        """Width of the latent of a key."""
        return int(self.down_proj.shape[1])

    @property
    def value_head_dim(self) -> int:
        """Width of a value."""
        return int(self._value_down.shape[0])

    @property
    def value_latent_dim(self) -> int:
        """Width of the latent of a value."""
        return int(self._value_down.shape[1])

    @property
    def dtype(self) -> str:
        """Dtype of the projections, and so of all that is cached and restored."""
        return dtype_name(self.down_proj.dtype)

    @property
    def weight(self) -> Array:
        """`down_proj`, whose library, dtype and device all that is cached has."""
        return self.down_proj

    @property
    def cached_sizes(self) -> tuple[int, int, int]:
        """``(num_heads, latent_dim, value_latent_dim)``."""
        return self.num_heads, self.latent_dim, self.value_latent_dim

    def check(self) -> None:
        """Check that the projections fit together.

        Raises
        ------
        NamespaceError, DTypeError, ShapeError
            If their libraries, devices, dtypes or shapes do not fit.
        SettingError
            If `num_heads` is not an integer of at least 1, or only one of the projections of
            values is given.
        """
        check_integer("num_heads", self.num_heads, 1)
        if (self.value_down_proj is None) != (self.value_up_proj is None):
            raise SettingError(
                "value_down_proj and value_up_proj must be given together, or both left out"
            )
        check_projections(
            {
                "down_proj": (self.down_proj, ("head_dim", "latent_dim")),
                "up_proj": (self.up_proj, ("latent_dim", "head_dim")),
                "rope_key": (self.rope_key, ("latent_dim", "head_dim")),
                "value_down_proj": (self.value_down_proj, ("value_head_dim", "value_latent_dim")),
                "value_up_proj": (self.value_up_proj, ("value_latent_dim", "value_head_dim")),
            }
        )

    def compress(self, k: Array, v: Array, /) -> tuple[Array, Array]:
        """Project keys and values to latents.

        Parameters
        ----------
        k : array ``[..., num_heads, seq_len, head_dim]``
        v : array ``[..., num_heads, seq_len, value_head_dim]``

        Returns
        -------
        k_latent : array ``[..., num_heads, seq_len, latent_dim]``
        v_latent : array ``[..., num_heads, seq_len, value_latent_dim]``

        Raises
        ------
        NamespaceError, DTypeError, ShapeError, SettingError
            If the arrays do not fit the projections, or these do not fit together.
        """
        self.check()
        self._check_pair(("k", k, self.head_dim), ("v", v, self.value_head_dim))
        return self._product(k, self.down_proj), self._product(v, self._value_down)

    def restore(self, k_latent: Array, v_latent: Array, /) -> tuple[Array, Array]:
        """Project latents back to keys and values.

        Parameters
        ----------
        k_latent : array ``[..., num_heads, seq_len, latent_dim]``
        v_latent : array ``[..., num_heads, seq_len, value_latent_dim]``

        Returns
        -------
        k : array ``[..., num_heads, seq_len, head_dim]``
        v : array ``[..., num_heads, seq_len, value_head_dim]``

        Raises
        ------
        NamespaceError, DTypeError, ShapeError, SettingError
            As of `compress`.
        """
        self.check()
        self._check_pair(
            ("k_latent", k_latent, self.latent_dim), ("v_latent", v_latent, self.value_latent_dim)
        )
        up = astype(self.up_proj, "float32")
        if self.rope_key is not None:
            up = up + astype(self.rope_key, "float32")
        value_up = self.up_proj if self.value_up_proj is None else self.value_up_proj
        return self._product(k_latent, up), self._product(v_latent, value_up)

    def restore_cached(self, k: Array, v: Array, /) -> tuple[Array, Array]:
        """Restore the keys and values of a sequence, as `restore` does."""
        return self.restore(k, v)

    @property
    def _value_down(self) -> Array:
        return self.down_proj if self.value_down_proj is None else self.value_down_proj

    def _product(self, x: Array, matrix: Array) -> Array:
        return astype(astype(x, "float32") @ astype(matrix, "float32"), self.dtype)

    def _check_pair(self, *given: tuple[str, Array, int]) -> None:
        for name, x, width in given:
            check_like(name, x, "down_proj", self.down_proj)
            if x.ndim < 3 or (x.shape[-3], x.shape[-1]) != (self.num_heads, width):
                raise ShapeError(
                    f"{name} must be [..., {self.num_heads}, seq_len, {width}], "
                    f"got shape {tuple(x.shape)}"
                )
        (name, x, _), (other, y, _) = given
        if tuple(x.shape[:-1]) != tuple(y.shape[:-1]):
            raise ShapeError(
                f"{name} and {other} must agree in all sizes but the last, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
