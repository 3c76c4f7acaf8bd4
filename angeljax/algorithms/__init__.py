"""Algorithms: one weight and its statistics in, a QTensor out."""

from angeljax.algorithms._base import Algorithm, algorithm_names, get_algorithm
from angeljax.algorithms._scales import ScaleOptions
from angeljax.algorithms.awq_clip import AWQClipOptions, awq_clip
from angeljax.algorithms.daq import DAQOptions, daq
from angeljax.algorithms.gptq import GPTAQOptions, GPTQOptions, gptaq, gptq
from angeljax.algorithms.lstsq34 import Lstsq34Options, lstsq34
from angeljax.algorithms.pt2_llm import PT2LLMOptions, pt2_llm
from angeljax.algorithms.rtn import RTNOptions, rtn

__all__ = [
    "AWQClipOptions",
    "Algorithm",
    "DAQOptions",
    "GPTAQOptions",
    "GPTQOptions",
    "Lstsq34Options",
    "PT2LLMOptions",
    "RTNOptions",
    "ScaleOptions",
    "algorithm_names",
    "awq_clip",
    "daq",
    "get_algorithm",
    "gptaq",
    "gptq",
    "lstsq34",
    "pt2_llm",
    "rtn",
]
