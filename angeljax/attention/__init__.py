"""Block-sparse attention for long prompts: selectors, and what uses them."""

from angeljax.attention._registry import selector, selector_names
from angeljax.attention._selector import Place, Selector
from angeljax.attention.static import AShape, Dense, Dilated, Strided, TriShape
from angeljax.attention.stem import Stem

__all__ = [
    "AShape",
    "Dense",
    "Dilated",
    "Place",
    "Selector",
    "Stem",
    "Strided",
    "TriShape",
    "selector",
    "selector_names",
]
