"""The product as XLA compiles it; the same code for all formats, see `_xla`."""

from pallas_kernels._xla import ORDER, matmul, unsupported

__all__ = ["ORDER", "matmul", "unsupported"]
