"""Calibration: statistics of what each weight of a model is multiplied with."""

from angeljax.calibration._statistics import Statistics, StatisticsError, merge
from angeljax.calibration.calibrate import calibrate

__all__ = ["Statistics", "StatisticsError", "calibrate", "merge"]
