"""Kernels over plain arrays, one folder for each operation. Imports jax only."""

from pallas_kernels._devices import implementation_for
from pallas_kernels._dispatch import cannot_hold, packed_matmul, prepare, restore
from pallas_kernels._weights import QUANTIZED, TERNARY, KernelError, WeightLayout
from pallas_kernels.block_sparse_attention import (
    BlockLists,
    Float8KV,
    block_sparse_attention,
    block_sparse_attention_fp8,
    quantize_kv,
)
from pallas_kernels.greedy_select.api import greedy_select
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.ragged_matmul.api import ragged_matmul
from pallas_kernels.rows_attention.api import rows_attention
from pallas_kernels.skinny_matmul.api import skinny_matmul
from pallas_kernels.ternary_matmul.api import ternary_matmul
from pallas_kernels.top_logits.api import TopLogits, top_logits

__all__ = [
    "QUANTIZED",
    "TERNARY",
    "BlockLists",
    "Float8KV",
    "KernelError",
    "TopLogits",
    "WeightLayout",
    "block_sparse_attention",
    "block_sparse_attention_fp8",
    "cannot_hold",
    "greedy_select",
    "implementation_for",
    "packed_matmul",
    "prepare",
    "quantize_kv",
    "quantized_matmul",
    "ragged_matmul",
    "restore",
    "rows_attention",
    "skinny_matmul",
    "ternary_matmul",
    "top_logits",
]
