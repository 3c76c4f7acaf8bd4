"""Algorithms: one weight and its statistics in, a QTensor out."""

from angeljax.algorithms._base import Algorithm, algorithm_names, get_algorithm
from angeljax.algorithms._scales import ScaleOptions
from angeljax.algorithms.gptq import GPTAQOptions, GPTQOptions, gptaq, gptq
from angeljax.algorithms.rtn import RTNOptions, rtn

__all__ = [
    "Algorithm",
    "GPTAQOptions",
    "GPTQOptions",
    "RTNOptions",
    "ScaleOptions",
    "algorithm_names",
    "get_algorithm",
    "gptaq",
    "gptq",
    "rtn",
]
