"""The product in plain `jax.numpy`: the path for CPUs and for everything unmeasured."""

from pallas_kernels.ternary_matmul.reference import ORDER, matmul, unsupported

__all__ = ["ORDER", "matmul", "unsupported"]
