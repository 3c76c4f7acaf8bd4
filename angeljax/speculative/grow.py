"""Trees that a drafter grows level by level, where it is most sure of itself.

Source: EAGLE-2 (arXiv 2406.16858, section 4): the k likeliest nodes of a level are
read at once, each gives k children, and of all that were found the likeliest stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.models._fused_rows import FusedRows
from angeljax.speculative._top import top_tokens


class Frontier(NamedTuple):
    """The nodes of one level that a drafter reads to find their children.

    Attributes:
      level: 0 for the children of the root, a Python integer.
      tokens: int32 `[B, k]`.
      parents: int32 `[B, k]`, which nodes of the frontier before they follow, for what
        a drafter keeps of these; zeros for the first.
      seen: bool `[B, k, k * levels]`, which of all frontier nodes each sees, itself
        included. Node i of level r is column `k * r + i`: so many slots behind the
        root's it has its keys and values. For `tree_mask`.
    """

    level: int
    tokens: jax.Array
    parents: jax.Array
    seen: jax.Array


def grow_tree(
    logits: jax.Array,
    read: Callable[[Frontier, Any], tuple[jax.Array, Any]],
    state: Any,
    *,
    branches: int,
    levels: int,
    nodes: int,
    rows: FusedRows | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Grows a tree and keeps its likeliest nodes.

    Args:
      logits: float `[B, V]`, the drafter's after the last committed token, each row up
        to a constant.
      read: `(frontier, state) -> (logits [B, k, V], state)`.
      state: what `read` carries along, such as a cache.
      branches: k, nodes of each frontier and children of each node.
      levels: frontiers that are read; the deepest nodes are `levels + 1` below the
        root.
      nodes: of the tree, the root included; at most `k + levels * k ** 2 + 1`.
      rows: how the drafter reads, which finds the likeliest tokens by a kernel too.

    Returns:
      Tokens `[B, nodes - 1]`, the likeliest nodes first, and parents `[B, nodes]` for
      `Draft`, and the state. The tree is a `DynamicTree(nodes, levels + 1)`, and so are
      its first nodes alone.

    Raises:
      ValueError: more nodes than are found.
    """
    k, batch = branches, len(logits)
    if not 1 < nodes <= k + levels * k * k + 1:
        raise ValueError(
            f"{levels} levels of {k} branches find {k + levels * k * k} nodes: a tree "
            f"of 2 to {k + levels * k * k + 1} with the root, not {nodes}"
        )
    each_row = jnp.arange(batch)[:, None]
    total, tokens = top_tokens(logits, k, rows=rows, log_probs=True)
    # All that was found, level by level; the parents are places in this list.
    found = [(total, tokens, jnp.full((batch, k), -1))]
    where, above = (
        jnp.broadcast_to(jnp.arange(k), (batch, k)),
        jnp.zeros((batch, k), int),
    )
    seen = jnp.zeros((batch, k, k * levels), bool)
    count = k
    for level in range(levels):
        own = jnp.arange(k * levels) == k * level + jnp.arange(k)[:, None]
        seen = seen[each_row, above] | own
        frontier = Frontier(
            level, tokens.astype(jnp.int32), above.astype(jnp.int32), seen
        )
        found_there, state = read(frontier, state)
        each, ids = (
            x.reshape(batch, k * k)
            for x in top_tokens(found_there, k, rows=rows, log_probs=True, offset=total)
        )
        found.append((each, ids, jnp.repeat(where, k, axis=1)))
        total, best = jax.lax.top_k(each, k)
        tokens, above = jnp.take_along_axis(ids, best, axis=1), best // k
        where, count = count + best, count + k * k
    scores, every, origin = (
        jnp.concatenate(x, axis=1) for x in zip(*found, strict=True)
    )
    # A node is no likelier than its parent, which comes before it: at a tie too the
    # parent is taken first, and no node stays without its own.
    kept = jax.lax.top_k(scores, nodes - 1)[1]
    parents = jnp.take_along_axis(origin, kept, axis=1)
    # Where each parent has gone; 0 is the root.
    same = [parents == kept[:, i : i + 1] for i in range(nodes - 1)]
    place = sum((i * s for i, s in enumerate(same, 1)), jnp.zeros_like(parents))
    root = jnp.full((batch, 1), -1)
    return (
        jnp.take_along_axis(every, kept, axis=1).astype(jnp.int32),
        jnp.concatenate([root, place], axis=1).astype(jnp.int32),
        state,
    )
