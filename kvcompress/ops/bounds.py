"""Whether values are fit to be compressed, in one look at them."""

from __future__ import annotations

from collections.abc import Iterator

from kvcompress.arrays import FLOAT16_MAX, Array, array_namespace
from kvcompress.ops.inputs import Call, Inputs
from kvcompress.ops.registry import SameValues, operation


def _examples(inputs: Inputs) -> Iterator[Call]:
    largest = FLOAT16_MAX if inputs.dtype == "float16" else 2.0**100
    for limit in inputs.choose(every=(0.5, 0.75, largest), usual=(largest,)):
        yield Call((inputs.tensor(),), {"limit": limit})


@operation(_examples, SameValues(), paged=True)
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
    # JAX finds the least byte in a third of the time that a false takes it; and the largest value
    # of numbers among which there is NaN may be another of them to it (jaxlib 0.10.2, processors).
    fit = xp.astype(xp.abs(x) <= limit, xp.uint8)
    return xp.all(xp.min(fit, axis=-1) == 1)
