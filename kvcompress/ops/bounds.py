"""Whether values are fit to be compressed, in one look at them."""

from __future__ import annotations

from kvcompress._namespace import Array, array_namespace


def within(x: Array, *, limit: float) -> Array:
    """Tell whether all magnitudes are at most `limit`; NaN is not.

    Parameters
    ----------
    x : array ``[..., tokens, channels]``, floating
    limit : float
        Must be a value of the dtype of `x`.

    Returns
    -------
    array ``[]``, bool
    """
    xp = array_namespace(x)
    return xp.all(xp.abs(x) <= limit)
