"""Fewer vision and audio tokens: selection and merging as pure functions."""

from angeljax.tokens._attention_weights import (
    AttentionWeights,
    attention_weights,
    pool_attention,
)
from angeljax.tokens._grouping import Groups, group_adjacent
from angeljax.tokens._keep import keep_count, keep_counts
from angeljax.tokens._placeholders import expand_placeholders, placeholder_count
from angeljax.tokens._prompt import Prompt
from angeljax.tokens._selection import Selection
from angeljax.tokens._where import span_groups, token_positions
from angeljax.tokens.apply import Pruned, apply_selection
from angeljax.tokens.atome import atome
from angeljax.tokens.fastadasp import fastadasp
from angeljax.tokens.samp import samp

__all__ = [
    "AttentionWeights",
    "Groups",
    "Prompt",
    "Pruned",
    "Selection",
    "apply_selection",
    "atome",
    "attention_weights",
    "expand_placeholders",
    "fastadasp",
    "group_adjacent",
    "keep_count",
    "keep_counts",
    "placeholder_count",
    "pool_attention",
    "samp",
    "span_groups",
    "token_positions",
]
