"""The product as a Triton kernel, through jax-triton: for GPUs without Hopper's
tensor cores. See `pallas_kernels._triton`; nothing of Triton is imported before a call.
"""

from pallas_kernels._triton import ORDER, matmul, prepare, restore, unsupported

__all__ = ["ORDER", "matmul", "prepare", "restore", "unsupported"]
