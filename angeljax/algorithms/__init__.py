"""Algorithms: one weight and its statistics in, a QTensor out."""

from angeljax.algorithms._base import Algorithm, algorithm_names, get_algorithm
from angeljax.algorithms._scales import ScaleOptions
from angeljax.algorithms.daq import DAQOptions, daq
from angeljax.algorithms.rtn import RTNOptions, rtn

__all__ = [
    "Algorithm",
    "DAQOptions",
    "RTNOptions",
    "ScaleOptions",
    "algorithm_names",
    "daq",
    "get_algorithm",
    "rtn",
]
