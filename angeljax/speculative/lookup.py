"""Prompt lookup: the text so far, searched for what stands at its end.

Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), also
"n-gram" speculation in serving engines. It needs no model and no training, and pays
where the text repeats what was said: summaries, edits, code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.speculative.drafter import Context, Draft, Drafter, Target

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """A chain of what followed the latest earlier occurrence of the last n tokens.

    Attributes:
      num_tokens: drafts of one round.
      max_ngram, min_ngram: n, the longest first. Short ones match often and are wrong
        often: `min_ngram=1` finds most and costs a wide forward for most of it.

    Raises:
      ValueError: an attribute that cannot be.

    Example:
      >>> from angeljax.speculative import PromptLookup
      >>> PromptLookup(4).width
      5
    """

    num_tokens: int = dataclasses.field(default=4, metadata=_static)
    max_ngram: int = dataclasses.field(default=3, metadata=_static)
    min_ngram: int = dataclasses.field(default=1, metadata=_static)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {self.num_tokens}")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"n-grams from min_ngram={self.min_ngram} to "
                f"max_ngram={self.max_ngram}: both at least 1, in order"
            )

    @property
    def width(self) -> int:
        return self.num_tokens + 1

    @property
    def optional(self) -> bool:
        return True

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        tokens, _ = lookup(
            context.tokens,
            context.lengths,
            count=self.num_tokens,
            max_ngram=self.max_ngram,
            min_ngram=self.min_ngram,
        )
        return Draft(tokens), state


def lookup(
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    count: int,
    max_ngram: int,
    min_ngram: int,
) -> tuple[jax.Array, jax.Array]:
    """What followed the latest earlier occurrence of the longest n-gram that has one.

    Where less than `count` tokens follow it, the continuation goes on with itself: a
    text that repeats a cycle is drafted for as long as one likes.

    Args:
      tokens: int32 `[B, S]`.
      lengths: int32 `[B]`, tokens of each row that count.
      count: tokens wanted.
      max_ngram, min_ngram: lengths of n-grams, the longest first.

    Returns:
      int32 `[B, count]`, -1 where nothing matches, and int32 `[B]`, the length of the
      n-gram that matches, 0 for none.
    """

    def row(tokens: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = tokens.shape[0]
        place = jnp.arange(size)
        # same[s]: how many tokens up to s are those at the end, at most max_ngram.
        alike = jnp.ones(size, bool)
        same = jnp.zeros(size, jnp.int32)
        for j in range(max_ngram):
            tail = tokens[jnp.maximum(n - 1 - j, 0)]
            ahead = jnp.pad(tokens, (j, 0), constant_values=-1)[:size]
            alike &= (ahead == tail) & (n - 1 - j >= 0)
            same += alike
        same = jnp.where(place < n - 1, same, 0)
        # The longest match; among these the latest. One maximum tells both.
        best = jnp.max(jnp.where(same > 0, same * size + place, 0))
        matched, at = best // size, best % size
        found = matched >= min_ngram
        cycle = jnp.maximum(n - 1 - at, 1)
        index = at + 1 + jnp.arange(count) % cycle
        drafts = tokens[jnp.minimum(index, size - 1)]
        return jnp.where(found, drafts, -1), jnp.where(found, matched, 0)

    return jax.vmap(row)(tokens, lengths)
