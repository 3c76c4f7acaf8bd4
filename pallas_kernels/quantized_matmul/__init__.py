"""`quantized_matmul`: see `api`."""

from pallas_kernels.quantized_matmul.api import prepare, restore, quantized_matmul

__all__ = ["prepare", "restore", "quantized_matmul"]
