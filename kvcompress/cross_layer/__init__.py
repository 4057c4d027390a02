"""The codec for whole caches: layers that hold the same tokens are coded together."""

from kvcompress.cross_layer.calibration import CrossLayerCalibration, layer_groups
from kvcompress.cross_layer.layer_group import LayerGroup, LayerShape
from kvcompress.cross_layer.parameters import CrossLayerParameters
from kvcompress.cross_layer.statistics import LayerGroupStatistics
from kvcompress.cross_layer.training import (
    LayerGroupBasis,
    fit_basis,
    train_layer_group,
    train_layer_groups,
)
from kvcompress.cross_layer.transform import CrossLayerTransform

__all__ = [
    "CrossLayerCalibration",
    "CrossLayerParameters",
    "CrossLayerTransform",
    "LayerGroup",
    "LayerGroupBasis",
    "LayerGroupStatistics",
    "LayerShape",
    "fit_basis",
    "layer_groups",
    "train_layer_group",
    "train_layer_groups",
]
