"""Arrays of any library: the one place that asks whose array it is.

For authors of backends outside this package, too: what is named here is public.
"""

from kvcompress.arrays.constants import kept
from kvcompress.arrays.host import HostArray, bisect, digest
from kvcompress.arrays.namespace import (
    FLOAT16_MAX,
    FLOATING,
    Array,
    Namespace,
    array_namespace,
    astype,
    check_array,
    device,
    dtype_name,
    dtype_of,
    is_concrete,
    itemsize,
    library_name,
    namespace_of,
)
from kvcompress.arrays.primitives import (
    detach,
    eigh,
    extremes,
    first_largest,
    largest_positions,
    look_up,
    map_blocks,
    map_matrices,
    on_cpu,
    quotient,
    scatter,
    values_at_a_time,
)
from kvcompress.arrays.pytrees import pytree, register_pytrees
from kvcompress.arrays.transfer import convert, to_host

__all__ = [
    "FLOAT16_MAX",
    "FLOATING",
    "Array",
    "HostArray",
    "Namespace",
    "array_namespace",
    "astype",
    "bisect",
    "check_array",
    "convert",
    "detach",
    "device",
    "digest",
    "dtype_name",
    "dtype_of",
    "eigh",
    "extremes",
    "first_largest",
    "is_concrete",
    "itemsize",
    "kept",
    "largest_positions",
    "library_name",
    "look_up",
    "map_blocks",
    "map_matrices",
    "namespace_of",
    "on_cpu",
    "pytree",
    "quotient",
    "register_pytrees",
    "scatter",
    "to_host",
    "values_at_a_time",
]
