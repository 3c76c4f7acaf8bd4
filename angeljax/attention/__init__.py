"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._registry import selector, selector_names
from angeljax.attention._selector import Place, Selector
from angeljax.attention.cosa import CoSA
from angeljax.attention.decode import Quest
from angeljax.attention.flashprefill import FlashPrefill
from angeljax.attention.flexprefill import FlexPrefill
from angeljax.attention.hooks import (
    jax_attention_fn,
    linen_attention_fn,
    nnx_attention_fn,
)
from angeljax.attention.hybrid import Hybrid
from angeljax.attention.mean_correction import mean_correction
from angeljax.attention.minference import MInference
from angeljax.attention.prefill import Prefill, SparseAttention
from angeljax.attention.quest import (
    KeyPages,
    init_pages,
    quest_attention,
    update_pages,
)
from angeljax.attention.sparse import sparse_attention
from angeljax.attention.static import AShape, Dense, Dilated, Strided, TriShape
from angeljax.attention.stem import Stem
from angeljax.attention.telemetry import AttentionReport, attention_report
from angeljax.attention.vecattention import VecAttention
from angeljax.attention.xattention import XAttention

__all__ = [
    "AShape",
    "AttentionReport",
    "CoSA",
    "Dense",
    "Dilated",
    "FlashPrefill",
    "FlexPrefill",
    "Hybrid",
    "KeyPages",
    "MInference",
    "Place",
    "Prefill",
    "Quest",
    "Selector",
    "SparseAttention",
    "Stem",
    "Strided",
    "TriShape",
    "VecAttention",
    "XAttention",
    "attention_report",
    "init_pages",
    "jax_attention_fn",
    "linen_attention_fn",
    "mean_correction",
    "nnx_attention_fn",
    "quest_attention",
    "selector",
    "selector_names",
    "sparse_attention",
    "update_pages",
]
