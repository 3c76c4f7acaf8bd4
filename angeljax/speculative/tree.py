"""Draft trees: who is whose parent, and what follows from it.

Node 0 is the root, the last committed token; nodes 1 and on are drafts, parents before
their children. A chain is the tree in which each node follows the one before it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree that is known while tracing.

    Attributes:
      parents: for each node the number of its parent; -1 for the root, which is first.

    Raises:
      ValueError: a node that comes before its parent, or no root.

    Example:
      >>> from angeljax.speculative import Tree
      >>> tree = Tree((-1, 0, 0, 1))
      >>> tree.nodes, tree.depth, tree.depths
      (4, 2, (0, 1, 1, 2))
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"node 0 is the root, with parent -1, not {self.parents}")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"node {node} has parent {parent}: parents come before children"
                )

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parents)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Distance of the deepest node from the root."""
        return max(self.depths)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """bool `[N, N]`: which nodes each descends from, itself included."""
        found = np.eye(self.nodes, dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            found[node] |= found[parent]
        return found


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """A tree whose parents come with each draft.

    Attributes:
      nodes: number of nodes, the root included.
      depth: distance from the root that no node exceeds.
    """

    nodes: int
    depth: int

    def __post_init__(self) -> None:
        if not 1 <= self.depth < self.nodes:
            raise ValueError(
                f"a tree of {self.nodes} nodes has a depth from 1 to {self.nodes - 1}, "
                f"not {self.depth}"
            )


def chain(nodes: int) -> Tree:
    """The tree in which each node follows the one before it.

    Args:
      nodes: the root included.

    Returns:
      A `Tree` of depth `nodes - 1`.
    """
    return Tree(tuple(range(-1, nodes - 1)))


def ancestors(parents: jax.Array, depth: int) -> jax.Array:
    """Which nodes each node descends from, itself included.

    Args:
      parents: int32 `[B, N]`, -1 for the root.
      depth: distance from the root that no node exceeds.

    Returns:
      bool `[B, N, N]`.
    """
    count = parents.shape[-1]
    step = parents[..., None] == jnp.arange(count)
    found = step | jnp.eye(count, dtype=bool)
    reach = 1
    while reach < depth:
        wide = found.astype(jnp.float32)
        found = jnp.einsum("bij,bjk->bik", wide, wide) > 0
        reach *= 2
    return found


def walk(
    parents: jax.Array,
    lines: jax.Array,
    tokens: jax.Array,
    chosen: jax.Array,
    depth: int,
) -> tuple[jax.Array, jax.Array]:
    """The longest way from the root down along which the target chose each token.

    Args:
      parents: int32 `[B, N]` or `[1, N]`, -1 for the root.
      lines: bool `[B, N, N]` or `[1, N, N]`, the `ancestors` of each node.
      tokens: int32 `[B, N]` of the nodes, -1 where there is none.
      chosen: int32 `[B, N]`, what the target puts after each node.
      depth: distance from the root that no node exceeds.

    Returns:
      int32 `[B, depth + 1]`, the nodes on the way, the last repeated; and int32 `[B]`,
      how many follow the root.
    """
    # All nodes at once: step by step it would be as many kernels as levels.
    batch, count = tokens.shape
    above = jnp.broadcast_to(jnp.maximum(parents, 0), (batch, count))
    wrong = tokens != jnp.take_along_axis(chosen, above, axis=1)
    wrong &= jnp.arange(count) > 0
    levels = jnp.sum(lines, axis=-1, dtype=jnp.int32) - 1
    good = ~jnp.any(lines & wrong[:, None], axis=-1)
    # The deepest; of equal ones the first.
    node = jnp.argmax(jnp.where(good, levels, -1), axis=1).astype(jnp.int32)
    lines = jnp.broadcast_to(lines, (batch, count, count))
    levels = jnp.broadcast_to(levels, (batch, count))
    line = jnp.take_along_axis(lines, node[:, None, None], axis=1)
    near = line & (levels[:, None] <= jnp.arange(depth + 1)[:, None])
    path = jnp.max(jnp.where(near, jnp.arange(count), 0), axis=-1)
    length = jnp.take_along_axis(levels, node[:, None], axis=1)[:, 0]
    return path.astype(jnp.int32), length
