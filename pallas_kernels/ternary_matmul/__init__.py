"""`ternary_matmul`: see `api`."""

from pallas_kernels.ternary_matmul.api import prepare, restore, ternary_matmul

__all__ = ["prepare", "restore", "ternary_matmul"]
