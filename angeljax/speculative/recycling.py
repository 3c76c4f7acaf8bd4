"""Token recycling: trees from what the target found likely after each token before.

Source: Token Recycling (arXiv 2408.08696). A table holds, for each token of the
vocabulary, the likeliest tokens after it when the target last read it. Drafts are a
tree of fixed shape through the table; what the target says about its nodes, the
rejected ones too, goes back into it. No training, and no cost but a few look-ups.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.speculative._rows import chain_mask
from angeljax.speculative._top import target_rows, top_tokens
from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    Prompt,
    Target,
    TargetModel,
    Verified,
)
from angeljax.speculative.sampling import Sampling
from angeljax.speculative.tree import Tree

_static = {"static": True}
# How often the r-th likeliest token of the table is the next one: 135M chat model.
RANKS = (0.40, 0.12, 0.07, 0.05, 0.035, 0.03, 0.025, 0.02)


def rank_tree(nodes: int, weights: Sequence[float] = RANKS) -> tuple[Tree, tuple]:
    """The likeliest tree where ranks are independent.

    Args:
      nodes: the root included.
      weights: probability of each rank, from the likeliest on.

    Returns:
      The tree, likeliest nodes first, and the rank of each node below its parent (0
      for the root).

    Example:
      >>> from angeljax.speculative import rank_tree
      >>> tree, ranks = rank_tree(5, (0.5, 0.3))
      >>> tree.parents, ranks
      ((-1, 0, 0, 1, 2), (0, 0, 1, 0, 0))
    """
    parents, ranks = [-1], [0]
    # (minus the probability, when it was found, parent, rank)
    heap = [(-weights[0], 0, 0, 0)]
    while len(parents) < nodes:
        score, _, parent, rank = heapq.heappop(heap)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        heapq.heappush(heap, (score * weights[0], 2 * node, node, 0))
        if rank + 1 < len(weights):
            other = score / weights[rank] * weights[rank + 1]
            heapq.heappush(heap, (other, 2 * node + 1, parent, rank + 1))
    return Tree(tuple(parents)), tuple(ranks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRecycling(Drafter):
    """A tree through a table of successors, which all rows share and bring up to date.

    Attributes:
      nodes: of the tree, the last token included; 15 suit a batch of one.
      weights: how likely each rank of the table is; its length is that of the table.
      table: int32 `[V, len(weights)]` to begin with, -1 for none, such as that of
        `successors` or of an earlier call (`State.drafter`); default empty.
      from_prompt: fill the table from the target's logits over the prompt first, which
        costs the head for each of its tokens.

    Raises:
      ValueError: an attribute that cannot be.

    Example:
      >>> from angeljax.speculative import TokenRecycling
      >>> drafter = TokenRecycling(nodes=15)
      >>> drafter.width, drafter.tree.depth
      (15, 4)
    """

    nodes: int = dataclasses.field(default=15, metadata=_static)
    weights: tuple[float, ...] = dataclasses.field(default=RANKS, metadata=_static)
    table: Any = None
    from_prompt: bool = dataclasses.field(default=True, metadata=_static)

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ValueError(f"nodes must be at least 2, not {self.nodes}")
        if not self.weights or not all(0 < w < 1 for w in self.weights):
            raise ValueError(f"weights must be between 0 and 1, not {self.weights}")

    @property
    def width(self) -> int:
        return self.nodes

    @property
    def tree(self) -> Tree:
        return self.ranked[0]

    @property
    def ranked(self) -> tuple[Tree, tuple[int, ...]]:
        """The tree, and the rank of each of its nodes below its parent."""
        return _tree(self.nodes, self.weights)

    @property
    def top_k(self) -> int:
        return len(self.weights)

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        wanted = (model.config.vocab_size, len(self.weights))
        if wanted[1] > wanted[0]:
            raise ValueError(f"{wanted[1]} weights for a vocabulary of {wanted[0]}")
        if self.table is not None and self.table.shape != wanted:
            raise ValueError(
                f"the table of successors must be {wanted}, not {self.table.shape}"
            )

    def init(self, target: Target, batch: int, slots: int) -> jax.Array:
        if self.table is not None:
            return jnp.asarray(self.table, jnp.int32)
        shape = target.model.config.vocab_size, len(self.weights)
        return jnp.full(shape, -1, jnp.int32)

    def prefill(self, target: Target, state: jax.Array, prompt: Prompt) -> jax.Array:
        if not self.from_prompt:
            return state
        count = prompt.tokens.shape[1]
        real = jnp.arange(count) < prompt.lengths[:, None]
        size = min(count, 64)  # logits of a whole prompt may not fit

        def some(table: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            part = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1
            )
            logits = target.model.head_rows(target.params, part(prompt.final))
            top = top_tokens(logits, self.top_k, rows=target_rows(target.model))
            return _learnt(table, part(prompt.tokens), part(real), top.ids), None

        # The last part may begin before the one before it has ended.
        return jax.lax.scan(some, state, jnp.arange(0, count, size))[0]

    def draft(
        self, target: Target, state: jax.Array, context: Context
    ) -> tuple[Draft, jax.Array]:
        tree, ranks = _tree(self.nodes, self.weights)
        nodes = [context.last]
        by_depth: dict[int, list[int]] = {}
        for node, depth in enumerate(tree.depths[1:], 1):
            by_depth.setdefault(depth, []).append(node)
        nodes += [context.last] * (self.nodes - 1)
        for level in by_depth.values():
            above = jnp.stack([nodes[tree.parents[j]] for j in level], axis=1)
            rank = jnp.asarray([ranks[j] for j in level])
            found = state[jnp.maximum(above, 0), rank]
            found = jnp.where(above < 0, -1, found)
            for place, node in enumerate(level):
                nodes[node] = found[:, place]
        return Draft(jnp.stack(nodes[1:], axis=1)), state

    def update(self, target: Target, state: jax.Array, verified: Verified) -> jax.Array:
        assert verified.top_ids is not None
        return _learnt(state, verified.tokens, verified.read, verified.top_ids)


def successors(
    model: TargetModel, params: Any, *, count: int = len(RANKS), chunk: int = 256
) -> jax.Array:
    """The likeliest tokens after each token alone: a table to begin with.

    Made once for each model, with one forward of one token for each of its tokens.

    Args:
      model, params: the target.
      count: successors of each token.
      chunk: tokens read at once.

    Returns:
      int32 `[V, count]`.
    """
    vocabulary = model.config.vocab_size
    ids = jnp.arange(vocabulary + -vocabulary % chunk).reshape(-1, chunk)
    return _successors(model, params, ids, count)[:vocabulary]


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _successors(model: Any, params: Any, ids: jax.Array, count: int) -> jax.Array:
    size = ids.shape[1]
    first = jnp.zeros((size, 1), jnp.int32)

    def some(ids: jax.Array) -> jax.Array:
        rows = model.read_rows(
            params,
            model.init_rows(size, 1),
            jnp.minimum(ids, model.config.vocab_size - 1)[:, None],
            positions=first,
            slots=first[:, 0],
            mask=chain_mask(first, 1),
        )
        logits = model.head_rows(params, rows.final)[:, 0]
        return jax.lax.top_k(logits, count)[1].astype(jnp.int32)

    return jax.lax.map(some, ids).reshape(-1, count)


def _learnt(
    table: jax.Array, tokens: jax.Array, real: jax.Array, top: jax.Array
) -> jax.Array:
    """The table with the successors of these tokens; of equal ones any may win."""
    at = jnp.where(real, tokens, len(table)).reshape(-1)
    rows = top.reshape(-1, top.shape[-1]).astype(table.dtype)
    return table.at[at].set(rows, mode="drop")


_tree = functools.lru_cache(maxsize=32)(rank_tree)
