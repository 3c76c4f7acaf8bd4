"""Fewer vision and audio tokens: selection and merging as pure functions."""

from angeljax.tokens._keep import keep_count, keep_counts
from angeljax.tokens._selection import Selection

__all__ = ["Selection", "keep_count", "keep_counts"]
