"""From scores of blocks to lists: the best of each row, and those that must be in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention._grid import Grid
from pallas_kernels import BlockLists


def check_options(selector: Any, always: Callable[[], int]) -> None:
    """Validates `block_size`, `keep_ratio` and `max_blocks` of a selector.

    Args:
      selector: with these fields.
      always: most blocks of a row that are always in.

    Raises:
      ValueError: one line that names the field.
    """
    if type(selector.block_size) is not int or selector.block_size < 1:
        raise ValueError(
            f"block_size must be a positive integer, not {selector.block_size!r}"
        )
    ratio, most, forced = selector.keep_ratio, selector.max_blocks, always()
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"keep_ratio must be above 0 and at most 1, not {ratio!r}")
    if most is not None and (type(most) is not int or most < forced):
        raise ValueError(
            f"max_blocks={most!r}: {forced} blocks of a row are always in, so use an "
            f"integer from {forced} on"
        )


def row_budgets(num_blocks: int, ratio: float) -> np.ndarray:
    """int32 `[num_blocks]`: blocks that row i keeps of its i + 1, at least 1."""
    seen = np.arange(1, num_blocks + 1)
    return np.maximum(np.floor(ratio * seen + 0.5), 1).astype(np.int32)


def ratio_density(
    total: int, block: int, ratio: float, forced: int, max_blocks: int | None
) -> float:
    """Share of the causal blocks that rows keep under `keep_ratio`."""
    blocks = -(-total // block)
    seen = np.arange(1, blocks + 1)
    kept = np.maximum(row_budgets(blocks, ratio), np.minimum(seen, forced))
    return float(np.minimum(kept, max_blocks or blocks).sum() / seen.sum())


def best(priority: jax.Array, budget: Any, most: int) -> jax.Array:
    """The `budget` highest entries of each row; of equals the first.

    Args:
      priority: float `[..., n]`; entries of -inf are never taken.
      budget: int32 `[...]`, from 0 on.
      most: static bound of the budgets.

    Returns:
      bool `[..., n]`.
    """
    most = max(min(most, priority.shape[-1]), 1)
    budget = jnp.broadcast_to(budget, priority.shape[:-1])[..., None]
    budget = jnp.minimum(budget, most)
    ordered = jax.lax.top_k(priority, most)[0]
    bar = jnp.take_along_axis(ordered, jnp.maximum(budget - 1, 0), -1)
    above, equal = priority > bar, priority == bar
    rank = jnp.cumsum(equal, -1, dtype=jnp.int32) + above.sum(-1, keepdims=True)
    taken = (above | (equal & (rank <= budget))) & (budget > 0)
    return taken & (priority > -jnp.inf)


def to_lists(
    score: jax.Array,
    wanted: jax.Array,
    forced: jax.Array,
    grid: Grid,
    *,
    always: int,
    keep_ratio: float | None,
    max_blocks: int | None,
) -> BlockLists:
    """Lists of the blocks that a method wants, or of a set share of the best.

    Args:
      score: float32 `[B, H, n_q, n_k]`, finite.
      wanted: bool of that shape: what the method selects. Not read with `keep_ratio`.
      forced: bool that broadcasts to it, always in. The diagonal is so without it.
      grid: of the call.
      always: most blocks of a row that `forced` names, the diagonal included.
      keep_ratio: each row keeps this share of its causal blocks, by score.
      max_blocks: most blocks of a row, by score.

    Returns:
      Lists for each query head; those of query blocks without a real query hold the
      diagonal alone.
    """
    block, size = grid.block, grid.num_k
    causal = grid.distance >= 0
    forced = (forced | (grid.distance == 0)) & causal
    priority = jnp.where(forced, jnp.inf, jnp.where(causal, score, -jnp.inf))
    width = size if max_blocks is None else min(max_blocks, size)
    if keep_ratio is None:
        keep = (wanted & causal) | forced
        if width < size:
            keep = best(jnp.where(keep, priority, -jnp.inf), width, width)
    else:
        budgets = row_budgets(size, keep_ratio)
        needed = forced.sum(-1, dtype=jnp.int32)
        budget = jnp.maximum(jnp.asarray(budgets)[grid.own][:, None], needed)
        width = min(width, max(int(budgets[-1]), always))
        keep = best(priority, jnp.minimum(budget, width), width)
    # Query blocks of padding read their own.
    first = grid.start[:, None] + jnp.arange(grid.num_q) * block
    padding = (first >= grid.end[:, None])[:, None, :, None]
    keep = jnp.where(padding, grid.distance == 0, keep)
    return BlockLists.from_mask(keep, block_q=block, block_k=block, width=width)
