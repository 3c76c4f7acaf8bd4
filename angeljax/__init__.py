"""angeljax: compression of JAX and Flax models as pure functions on param trees."""

from angeljax import ops, qat
from angeljax._partition import combine, partition
from angeljax._report import CompressionReport, report
from angeljax.allocation import Allocation, allocate, measure_latency
from angeljax.bind import bind
from angeljax.calibration import (
    Statistics,
    StatisticsError,
    calibrate,
    compress_sequential,
)
from angeljax.compress import compress, plan
from angeljax.export import load, save
from angeljax.formats import QTensor, quantize
from angeljax.prepare import PreparedTensor, prepare, restore
from angeljax.recipe import Recipe, RecipeError, Rule

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "CompressionReport",
    "PreparedTensor",
    "QTensor",
    "Recipe",
    "RecipeError",
    "Rule",
    "Statistics",
    "StatisticsError",
    "allocate",
    "bind",
    "calibrate",
    "combine",
    "compress",
    "compress_sequential",
    "load",
    "measure_latency",
    "ops",
    "partition",
    "plan",
    "prepare",
    "qat",
    "quantize",
    "report",
    "restore",
    "save",
]
