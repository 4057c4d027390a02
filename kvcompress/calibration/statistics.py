"""What a calibration knows of one layer: moments of keys, values and queries, and sample rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from kvcompress.arrays import HostArray, digest
from kvcompress.calibration.ropes import rope_array
from kvcompress.rope import RoPE


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of one layer, over the tokens a calibration saw; NumPy arrays on the host.

    Equal, and hashed, by their values: see `fingerprint`. Keys and queries are those before RoPE
    where `rope` is known, else as they were given.

    Attributes
    ----------
    key_mean : array ``[heads, head_dim]``, float64
    key_covariance : array ``[heads * head_dim, heads * head_dim]``, float64
    query_moment : array ``[heads, head_dim, head_dim]``, float64
        Mean of ``q q^T`` over the queries that read each KV head; the identity without queries.
    value_mean : array ``[heads, head_dim]``, float64
        Of the values over their norms.
    value_covariance : array ``[heads * head_dim, heads * head_dim]``, float64
        Of the values over their norms.
    value_log_norm : array ``[heads]``, float64
        Mean binary logarithm of the norms of the values.
    key_rows, value_rows : arrays ``[heads, rows, head_dim]``, float16
        Keys, and values over their norms, of tokens drawn at random.
    rope : RoPE or None
        The rotary embedding that was undone.
    """

    key_mean: HostArray
    key_covariance: HostArray
    query_moment: HostArray
    value_mean: HostArray
    value_covariance: HostArray
    value_log_norm: HostArray
    key_rows: HostArray
    value_rows: HostArray
    rope: RoPE | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all values, in hexadecimal."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rope"}
        return digest({**arrays, **rope_array(self.rope)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerStatistics) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        heads, rows, _ = self.key_rows.shape
        return f"LayerStatistics({heads} heads, {rows} rows, {self.fingerprint[:12]})"
