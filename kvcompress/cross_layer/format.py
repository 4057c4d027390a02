"""What files of layer groups hold: rules for arrays, and shapes of layers read from JSON."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvcompress.arrays import FLOAT16_MAX, HostArray
from kvcompress.cross_layer.layer_group import LayerGroup, LayerShape
from kvcompress.cross_layer.metric import Metric, matrix_numbers, split_matrices
from kvcompress.entropy.context_model import CLASSES, DOWN, REACH, SYMBOLS, UP
from kvcompress.entropy.rans import TOTAL
from kvcompress.files import ArrayRule, Facts, check_arrays, require
from kvcompress.files.facts import LAYERS
from kvcompress.rope.embedding import RoPE

TOKENS = 1 << 53

_SIZE = 1 << 24
"""Most heads, and channels of a head."""

_INVERSE = 2.0**26
"""Largest number of an inverse of the metric: numbers below it vanish in float16."""

STATISTICS: Mapping[str, ArrayRule] = {
    "tags": ArrayRule(("rows",), "float64", low=0, high=1),
    "rows": ArrayRule(("rows", "width"), "float16", low=-FLOAT16_MAX, high=FLOAT16_MAX),
    "sum": ArrayRule(("width",), "float64", low=-(2.0**110), high=2.0**110),
    "moment": ArrayRule(("width", "width"), "float32", high=2.0**126, moments=True),
    "gradients": ArrayRule(("numbers",), "float64", low=-(2.0**160), high=2.0**160),
    "importance": ArrayRule(("width",), "float64", low=-(2.0**110), high=2.0**110),
}
"""Arrays of a `LayerGroupStatistics`."""

PARAMETERS: Mapping[str, ArrayRule] = {
    "mean": ArrayRule(("width",), "float32", low=-(2.0**100), high=2.0**100),
    "metric_roots": ArrayRule(("numbers",), "float16"),
    "step": ArrayRule((1,), "float32", low=2.0**-50, high=2.0**40),
    "basis_half": ArrayRule(("halves", "width"), "float16", low=-1, high=1),
    "basis_byte": ArrayRule(("bytes", "width"), "int8", low=-127),
    "basis_nibble": ArrayRule(("nibbles", "half_width"), "uint8"),
    "basis_scale": ArrayRule(("components",), "float32", low=0, high=2),
    "importance": ArrayRule(("first",), "float32", low=-(2.0**40), high=2.0**40),
    "level_frequencies": ArrayRule((2 * REACH + 1,), "uint16", low=1, total=TOTAL),
    "classes": ArrayRule(("components",), "uint8", high=CLASSES - 1),
    "residual_classes": ArrayRule(("width",), "uint8", high=CLASSES - 1),
    "limit": ArrayRule((1,), "float32", low=0),
    "rounding": ArrayRule((CLASSES,), "float32", low=0, high=1),
    "centres": ArrayRule((2, CLASSES), "float32", low=-0.5, high=0.5),
    "frequencies": ArrayRule((CLASSES, SYMBOLS), "uint16", low=1, total=TOTAL),
    "magnitudes": ArrayRule((CLASSES,), "int64", low=0, high=2.0**40),
    "thresholds": ArrayRule((DOWN + UP,), "int64", low=0, high=2.0**60, rising=True),
}
"""Arrays of a `CrossLayerParameters`."""


def read_group(facts: Facts) -> LayerGroup:
    """Read what `LayerGroup.to_dict` returned.

    Raises
    ------
    CalibrationError, SettingError
    """
    shapes = []
    for shape in facts.objects("shapes", "heads", "key_dim", "value_dim", "rope"):
        heads, key_dim, value_dim = (
            shape.integer(name, 1, _SIZE) for name in ("heads", "key_dim", "value_dim")
        )
        none = shape.plain["rope"] is None
        rope = None if none else RoPE.from_dict(shape.object("rope").plain)
        shapes.append(LayerShape(heads, key_dim, value_dim, rope))
    return LayerGroup(tuple(facts.integers("layers", 0, LAYERS - 1)), tuple(shapes))


def check_statistics(
    group: LayerGroup, arrays: Mapping[str, HostArray], tokens: int, weighed: int, rows: int
) -> None:
    """Check the arrays of a `LayerGroupStatistics`.

    Raises
    ------
    CalibrationError, SettingError
    """
    known = {"width": group.width, "numbers": matrix_numbers(group), "rows": min(tokens, rows)}
    check_arrays(arrays, STATISTICS, known)
    require(weighed <= tokens, f"weighed must be at most the {tokens} tokens, got {weighed}")
    for name in ("gradients", "importance"):
        told = weighed > 0 or not np.any(arrays[name])
        require(told, f"array {name} must be zero, as no gradients were seen")
    moments = [x for layer in split_matrices(group, arrays["gradients"]) for x in layer]
    for x in moments:
        check_arrays(
            {"gradients": x}, {"gradients": ArrayRule(x.shape, "float64", moments=True)}, {}
        )
    _check_embeddings(group)


def check_parameters(group: LayerGroup, arrays: Mapping[str, HostArray]) -> None:
    """Check the arrays of a `CrossLayerParameters`, and that what they restore is finite.

    Raises
    ------
    CalibrationError, SettingError
    """
    width = group.width
    known = {"width": width, "half_width": (width + 1) // 2, "numbers": matrix_numbers(group)}
    sizes = check_arrays(arrays, PARAMETERS, known)
    components = sizes["components"]
    held = [sizes[name] for name in ("halves", "bytes", "nibbles")]
    require(
        0 < components == sum(held) <= width,
        f"array basis_scale must be of the {held} rows of the basis, got {components}",
    )
    require(
        sizes["first"] <= components,
        f"array importance must be of {components} components at most, got {sizes['first']}",
    )
    try:
        inverse = Metric(group, arrays["metric_roots"].astype(np.float32)).inverse().roots
        largest = float(np.max(np.abs(inverse)))
    except np.linalg.LinAlgError:
        largest = np.inf
    require(
        largest <= _INVERSE,
        f"array metric_roots must have inverses up to {_INVERSE:g}, got {largest:g}",
    )
    _check_embeddings(group)


def _check_embeddings(group: LayerGroup) -> None:
    """Check that rotary embeddings are finite, now that their sizes are those of arrays."""
    for rope in {shape.rope for shape in group.shapes if shape.rope is not None}:
        rope.check_finite()
