"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._registry import selector, selector_names
from angeljax.attention._selector import Place, Selector
from angeljax.attention.flashprefill import FlashPrefill
from angeljax.attention.flexprefill import FlexPrefill
from angeljax.attention.mean_correction import mean_correction
from angeljax.attention.minference import MInference
from angeljax.attention.quest import (
    KeyPages,
    init_pages,
    quest_attention,
    update_pages,
)
from angeljax.attention.static import AShape, Dense, Dilated, Strided, TriShape
from angeljax.attention.stem import Stem
from angeljax.attention.vecattention import VecAttention

__all__ = [
    "AShape",
    "Dense",
    "Dilated",
    "FlashPrefill",
    "FlexPrefill",
    "KeyPages",
    "MInference",
    "Place",
    "Selector",
    "Stem",
    "Strided",
    "TriShape",
    "VecAttention",
    "init_pages",
    "mean_correction",
    "quest_attention",
    "selector",
    "selector_names",
    "update_pages",
]
