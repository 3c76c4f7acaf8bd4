"""Algorithms: one weight and its statistics in, a QTensor out."""

from angeljax.algorithms._base import Algorithm, algorithm_names, get_algorithm
from angeljax.algorithms._scales import ScaleOptions
from angeljax.algorithms.gptq import GPTAQOptions, GPTQOptions, gptaq, gptq
from angeljax.algorithms.lstsq34 import Lstsq34Options, lstsq34
from angeljax.algorithms.pt2_llm import PT2LLMOptions, pt2_llm
from angeljax.algorithms.rtn import RTNOptions, rtn

__all__ = [
    "Algorithm",
    "GPTAQOptions",
    "GPTQOptions",
    "PT2LLMOptions",
    "Lstsq34Options",
    "RTNOptions",
    "ScaleOptions",
    "algorithm_names",
    "get_algorithm",
    "gptaq",
    "gptq",
    "pt2_llm",
    "lstsq34",
    "rtn",
]
