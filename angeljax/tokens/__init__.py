"""Fewer vision and audio tokens: selection and merging as pure functions."""

from angeljax.tokens._attention_weights import (
    AttentionWeights,
    attention_weights,
    pool_attention,
)
from angeljax.tokens._grouping import Groups, group_adjacent
from angeljax.tokens._keep import keep_count, keep_counts
from angeljax.tokens._selection import Selection
from angeljax.tokens.atome import atome
from angeljax.tokens.fastadasp import fastadasp
from angeljax.tokens.samp import samp

__all__ = [
    "AttentionWeights",
    "Groups",
    "Selection",
    "atome",
    "attention_weights",
    "fastadasp",
    "group_adjacent",
    "keep_count",
    "keep_counts",
    "pool_attention",
    "samp",
]
