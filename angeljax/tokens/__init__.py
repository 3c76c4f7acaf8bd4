"""Fewer vision and audio tokens: selection and merging as pure functions."""

from angeljax.tokens._keep import keep_count, keep_counts
from angeljax.tokens._placeholders import expand_placeholders, placeholder_count
from angeljax.tokens._prompt import Prompt
from angeljax.tokens._selection import Selection
from angeljax.tokens._where import span_groups, token_positions
from angeljax.tokens.apply import Pruned, apply_selection

__all__ = [
    "Prompt",
    "Pruned",
    "Selection",
    "apply_selection",
    "expand_placeholders",
    "keep_count",
    "keep_counts",
    "placeholder_count",
    "span_groups",
    "token_positions",
]
