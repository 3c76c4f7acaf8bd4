"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._registry import selector, selector_names
from angeljax.attention._selector import Place, Selector
from angeljax.attention.cosa import CoSA
from angeljax.attention.decode import Quest
from angeljax.attention.hybrid import Hybrid
from angeljax.attention.prefill import Prefill, SparseAttention
from angeljax.attention.sparse import sparse_attention
from angeljax.attention.static import AShape, Dense, Dilated, Strided, TriShape
from angeljax.attention.stem import Stem
from angeljax.attention.xattention import XAttention

__all__ = [
    "AShape",
    "CoSA",
    "Dense",
    "Dilated",
    "Hybrid",
    "Place",
    "Prefill",
    "Quest",
    "Selector",
    "SparseAttention",
    "Stem",
    "Strided",
    "TriShape",
    "XAttention",
    "selector",
    "selector_names",
    "sparse_attention",
]
