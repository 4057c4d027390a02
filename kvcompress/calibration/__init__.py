"""What a live codec must know of a model: statistics, and what is trained on them."""

from kvcompress.calibration.calibration import Calibration
from kvcompress.calibration.parameters import LayerParameters, RoleParameters
from kvcompress.calibration.statistics import LayerStatistics

__all__ = [
    "Calibration",
    "LayerParameters",
    "LayerStatistics",
    "RoleParameters",
]
