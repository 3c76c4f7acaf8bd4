"""The product as a Pallas kernel for TPUs. See `pallas_kernels._tpu` and, for the order
of the planes, `pallas_kernels._tpu_order`.
"""

from pallas_kernels._tpu import ORDER, matmul, prepare, restore, unsupported

__all__ = ["ORDER", "matmul", "prepare", "restore", "unsupported"]
