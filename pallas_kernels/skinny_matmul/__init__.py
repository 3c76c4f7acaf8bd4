"""Products of few tokens with a dense weight, and what stands around them."""

from pallas_kernels.skinny_matmul.api import skinny_matmul

__all__ = ["skinny_matmul"]
