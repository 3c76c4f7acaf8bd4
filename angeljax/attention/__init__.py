"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._registry import selector, selector_names
from angeljax.attention._selector import Place, Selector
from angeljax.attention.prefill import Prefill, SparseAttention
from angeljax.attention.sparse import sparse_attention
from angeljax.attention.static import AShape, Dense, Dilated, Strided, TriShape
from angeljax.attention.stem import Stem

__all__ = [
    "AShape",
    "Dense",
    "Dilated",
    "Place",
    "Prefill",
    "Selector",
    "SparseAttention",
    "Stem",
    "Strided",
    "TriShape",
    "selector",
    "selector_names",
    "sparse_attention",
]
