"""`ragged_matmul`: see `api`."""

from pallas_kernels.ragged_matmul.api import ragged_matmul

__all__ = ["ragged_matmul"]
