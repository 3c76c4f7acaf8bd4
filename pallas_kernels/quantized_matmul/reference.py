"""The product as it is defined; the same code as for ternary weights."""

from pallas_kernels.ternary_matmul.reference import ORDER, matmul, unsupported

__all__ = ["ORDER", "matmul", "unsupported"]
