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
    def lines(self) -> np.ndarray:
        """int32 `[N, depth + 1]`: each node, its parent, ...; -1 above the root."""
        line = [np.arange(self.nodes, dtype=np.int32)]
        above = np.asarray(self.parents, np.int32)
        for _ in range(self.depth):
            line.append(np.where(line[-1] < 0, -1, above[line[-1]]))
        return np.stack(line, axis=-1).astype(np.int32)

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


def climb(parents: jax.Array, depth: int) -> jax.Array:
    """Each node, its parent, and so on up to the root.

    Args:
      parents: int32 `[B, N]`, -1 for the root.
      depth: distance from the root that no node exceeds.

    Returns:
      int32 `[B, N, depth + 1]`; -1 above the root.
    """
    # Small gathers one into another are one kernel; products of matrices are some.
    row = jnp.arange(len(parents))[:, None]
    place = jnp.arange(parents.shape[1], dtype=jnp.int32)
    line = [jnp.broadcast_to(place, parents.shape)]
    for _ in range(depth):
        above = parents.at[row, jnp.maximum(line[-1], 0)].get(mode="promise_in_bounds")
        line.append(jnp.where(line[-1] < 0, -1, above.astype(jnp.int32)))
    return jnp.stack(line, axis=-1)


def levels(lines: jax.Array) -> jax.Array:
    """int32 `[B, N]`: distance of each node from the root, of what `climb` gives."""
    return sum(
        ((lines[..., r] >= 0).astype(jnp.int32) for r in range(1, lines.shape[-1])),
        jnp.zeros(lines.shape[:2], jnp.int32),
    )


def ancestors(lines: jax.Array) -> jax.Array:
    """bool `[B, N, N]`: which nodes each descends from, itself included.

    Args:
      lines: of `climb`.
    """
    place = jnp.arange(lines.shape[1])
    found = [lines[..., r, None] == place for r in range(lines.shape[-1])]
    return functools.reduce(jnp.logical_or, found)


def walk(
    lines: jax.Array, tokens: jax.Array, chosen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The longest way from the root down along which the target chose each token.

    Args:
      lines: int32 `[B, N, depth + 1]` or `[1, N, depth + 1]`, what `climb` gives.
      tokens: int32 `[B, N]` of the nodes, -1 where there is none.
      chosen: int32 `[B, N]`, what the target puts after each node.

    Returns:
      int32 `[B, depth + 1]`, the nodes on the way, the last repeated; and int32 `[B]`,
      how many follow the root.
    """
    # All nodes at once: step by step it would be as many kernels as levels.
    (batch, count), depth = tokens.shape, lines.shape[-1] - 1
    lines = jnp.broadcast_to(lines, (batch, count, depth + 1))
    row = jnp.arange(batch)[:, None]

    def at(x: jax.Array, node: jax.Array) -> jax.Array:
        return x.at[row, jnp.maximum(node, 0)].get(mode="promise_in_bounds")

    good = jnp.ones((batch, count), bool)
    for r in range(depth):
        node, above = lines[..., r], lines[..., r + 1]
        good &= (above < 0) | (at(tokens, node) == at(chosen, above))
    # The deepest; of equal ones the first.
    place = jnp.arange(count, dtype=jnp.int32)
    score = jnp.where(good, levels(lines) * count + count - 1 - place, -1)
    best = jnp.max(score, axis=1)
    length, last = best // count, count - 1 - best % count
    up = jnp.maximum(length[:, None] - jnp.arange(depth + 1), 0)
    path = lines.at[row, last[:, None], up].get(mode="promise_in_bounds")
    return path.astype(jnp.int32), length.astype(jnp.int32)
