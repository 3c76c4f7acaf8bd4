"""Attention of each query block on a list of key blocks of its own."""

from pallas_kernels.block_sparse_attention._lists import BlockLists
from pallas_kernels.block_sparse_attention.api import block_sparse_attention

__all__ = ["BlockLists", "block_sparse_attention"]
