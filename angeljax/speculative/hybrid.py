"""Prompt lookup within the tree of another drafter.

What follows an n-gram that the text has had before is long and often right as a whole;
a tree is short and right a little everywhere. In one draft each makes up for the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    Prompt,
    Target,
    TargetModel,
    Verified,
)
from angeljax.speculative.eagle import EagleDrafter
from angeljax.speculative.lookup import PromptLookup, lookup
from angeljax.speculative.recycling import TokenRecycling
from angeljax.speculative.sampling import Sampling
from angeljax.speculative.tree import DynamicTree

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hybrid(Drafter):
    """Prompt lookup where it finds something, within a tree that another drafter has.

    A continuation that was found takes the first nodes, as a chain; the likeliest
    branches of the tree keep the others. Where nothing is found all is the tree's.

    Attributes:
      drafter: has the tree: a `TokenRecycling`, or an `EagleDrafter` with `growth`.
      lookup: has the n-grams; its `num_tokens` must be fewer than the tree's nodes.
      flat_ngram: where this many last tokens were found before, in all rows, a head
        drafts the likeliest next tokens beside the continuation and no deeper nodes,
        which saves reading them; at most `lookup.max_ngram`. Default never.

    Raises:
      ValueError: the continuation leaves no root, or there is no tree.

    Example:
      >>> from angeljax.speculative import Hybrid
      >>> Hybrid().width
      15
    """

    drafter: TokenRecycling | EagleDrafter = TokenRecycling()
    lookup: PromptLookup = dataclasses.field(
        default=PromptLookup(10, min_ngram=2), metadata=_static
    )
    flat_ngram: int | None = dataclasses.field(default=None, metadata=_static)

    def __post_init__(self) -> None:
        drafter, most = self.drafter, self.lookup.max_ngram
        if self.flat_ngram is not None:
            if isinstance(drafter, TokenRecycling):
                raise ValueError("flat_ngram is for a head, whose levels cost time")
            if not 1 <= self.flat_ngram <= most:
                raise ValueError(
                    f"flat_ngram must be from 1 to max_ngram={most}, not "
                    f"{self.flat_ngram}"
                )
        if not isinstance(drafter, TokenRecycling | EagleDrafter):
            return  # within a transformation of the tree
        if isinstance(drafter, EagleDrafter) and drafter.growth is None:
            raise ValueError(
                "the head drafts a chain: give it a tree, growth=EagleTree"
            )
        if self.lookup.num_tokens >= drafter.width:
            raise ValueError(
                f"lookup of {self.lookup.num_tokens} tokens in a tree of "
                f"{drafter.width} nodes: at most {drafter.width - 1}"
            )

    @property
    def width(self) -> int:
        return self.drafter.width

    @property
    def tree(self) -> DynamicTree:
        tree = self.drafter.tree
        assert tree is not None
        return DynamicTree(self.width, max(self.lookup.num_tokens, tree.depth))

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.drafter.hidden

    @property
    def top_k(self) -> int:
        return self.drafter.top_k

    @property
    def reach(self) -> int:
        return self.drafter.reach

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        self.drafter.check(model, sampling)
        if self.flat_ngram is not None:
            assert isinstance(self.drafter, EagleDrafter)
            if self.width - 1 > (most := self.drafter.config.draft_vocab_size):
                raise ValueError(
                    f"flat_ngram with {self.width} nodes of {most} tokens: at most "
                    f"{most + 1} nodes"
                )

    def init(self, target: Target, batch: int, slots: int) -> Any:
        if isinstance(self.drafter, EagleDrafter):
            # As many pairs as a continuation can leave.
            return self.drafter.init(target, batch, slots, pairs=self.tree.depth + 1)
        return self.drafter.init(target, batch, slots)

    def prefill(self, target: Target, state: Any, prompt: Prompt) -> Any:
        return self.drafter.prefill(target, state, prompt)

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        count = self.lookup.num_tokens
        line, matched = lookup(
            context.tokens,
            context.lengths,
            count=count,
            max_ngram=self.lookup.max_ngram,
            min_ngram=self.lookup.min_ngram,
        )
        found = matched > 0
        if self.flat_ngram is None:
            draft, state = self.drafter.draft(target, state, context)
        else:
            assert isinstance(self.drafter, EagleDrafter)
            flat = jnp.all((matched >= self.flat_ngram) | ~context.active)
            draft, state = self.drafter.draft(target, state, context, flat=flat)
        left = self.width - count
        parents = draft.parents
        if parents is None:
            fixed = self.drafter.tree
            parents = jnp.asarray(fixed.parents)[None]  # type: ignore[union-attr]
        parents = jnp.broadcast_to(parents, (len(line), self.width))
        # The first nodes of a tree are its likeliest, and no parent is missing.
        rest = parents[:, 1:left]
        rest = jnp.where(rest == 0, 0, rest + count)
        first = jnp.broadcast_to(jnp.arange(-1, count), (len(line), count + 1))
        tokens = jnp.concatenate([line, draft.tokens[:, : left - 1]], axis=1)
        some = found[:, None]
        both = Draft(
            tokens=jnp.where(some, tokens, draft.tokens),
            parents=jnp.where(
                some, jnp.concatenate([first, rest], axis=1), parents
            ).astype(jnp.int32),
        )
        return both, state

    def update(self, target: Target, state: Any, verified: Verified) -> Any:
        return self.drafter.update(target, state, verified)
