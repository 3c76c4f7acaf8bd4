"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._registry import selector, selector_names
from angeljax.attention._selector import Place, Selector
<<<<<<< HEAD
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
=======
from angeljax.attention.cosa import CoSA
from angeljax.attention.hybrid import Hybrid
from angeljax.attention.static import AShape, Dense, Dilated, Strided, TriShape
from angeljax.attention.stem import Stem
from angeljax.attention.xattention import XAttention
>>>>>>> bsa-c1

__all__ = [
    "AShape",
    "CoSA",
    "Dense",
    "Dilated",
<<<<<<< HEAD
    "FlashPrefill",
    "FlexPrefill",
    "KeyPages",
    "MInference",
=======
    "Hybrid",
>>>>>>> bsa-c1
    "Place",
    "Selector",
    "Stem",
    "Strided",
    "TriShape",
<<<<<<< HEAD
    "VecAttention",
    "init_pages",
    "mean_correction",
    "quest_attention",
=======
    "XAttention",
>>>>>>> bsa-c1
    "selector",
    "selector_names",
    "update_pages",
]
