"""Attention of each query block on a list of key blocks of its own."""

from pallas_kernels.block_sparse_attention._float8 import Float8KV, quantize_kv
from pallas_kernels.block_sparse_attention._lists import BlockLists
from pallas_kernels.block_sparse_attention.api import (
    block_sparse_attention,
    block_sparse_attention_fp8,
)

__all__ = [
    "BlockLists",
    "Float8KV",
    "block_sparse_attention",
    "block_sparse_attention_fp8",
    "quantize_kv",
]
