"""Calibration: statistics of what each weight of a model is multiplied with."""

from angeljax.calibration._layerwise import LayerwiseModel
from angeljax.calibration._statistics import Statistics, StatisticsError, merge
from angeljax.calibration.calibrate import calibrate
from angeljax.calibration.memory import MemoryEstimate, estimate_memory
from angeljax.calibration.sequential import compress_sequential
from angeljax.calibration.text import calibration_tokens

__all__ = [
    "LayerwiseModel",
    "MemoryEstimate",
    "Statistics",
    "StatisticsError",
    "calibrate",
    "calibration_tokens",
    "compress_sequential",
    "estimate_memory",
    "merge",
]
