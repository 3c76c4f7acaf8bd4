"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._selector import Place, Selector
from angeljax.attention.prefill import Prefill, SparseAttention
from angeljax.attention.sparse import sparse_attention

__all__ = ["Place", "Prefill", "Selector", "SparseAttention", "sparse_attention"]
