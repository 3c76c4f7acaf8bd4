"""Kernels over plain arrays, one folder for each operation. Imports jax only."""

from pallas_kernels._weights import KernelError, WeightLayout
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.ternary_matmul.api import ternary_matmul

__all__ = ["KernelError", "WeightLayout", "quantized_matmul", "ternary_matmul"]
