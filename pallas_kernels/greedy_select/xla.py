"""Plain XLA."""

from pallas_kernels.greedy_select.reference import select, unsupported

__all__ = ["select", "unsupported"]
