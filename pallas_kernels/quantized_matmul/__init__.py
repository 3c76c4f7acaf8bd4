"""`quantized_matmul`: see `api`."""

from pallas_kernels.quantized_matmul.api import prepare, quantized_matmul, restore

__all__ = ["prepare", "restore", "quantized_matmul"]
