"""Algorithms: one weight and its statistics in, a QTensor out."""

from angeljax.algorithms._base import Algorithm, algorithm_names, get_algorithm
from angeljax.algorithms.awq_clip import AWQClipOptions, awq_clip
from angeljax.algorithms.rtn import RTNOptions, rtn

__all__ = [
    "AWQClipOptions",
    "Algorithm",
    "RTNOptions",
    "algorithm_names",
    "awq_clip",
    "get_algorithm",
    "rtn",
]
