"""Algorithms: one weight and its statistics in, a QTensor out."""

from angeljax.algorithms._base import Algorithm, algorithm_names, get_algorithm
from angeljax.algorithms._scales import ScaleOptions
from angeljax.algorithms.awq_clip import AWQClipOptions, awq_clip
from angeljax.algorithms.gptq import GPTAQOptions, GPTQOptions, gptaq, gptq
from angeljax.algorithms.lstsq34 import Lstsq34Options, lstsq34
from angeljax.algorithms.rtn import RTNOptions, rtn

__all__ = [
    "AWQClipOptions",
    "Algorithm",
    "GPTAQOptions",
    "GPTQOptions",
    "Lstsq34Options",
    "RTNOptions",
    "ScaleOptions",
    "algorithm_names",
    "awq_clip",
    "get_algorithm",
    "gptaq",
    "gptq",
    "lstsq34",
    "rtn",
]
