"""From scores and wishes of a method to lists: the options that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _budgets, _options, _words
from angeljax.attention._frame import Frame
from pallas_kernels import BlockLists

_TOP = np.uint32(0xFFFFFFFF)


def check(selector: Any, forced: Callable[[], tuple[int, int]]) -> None:
    """Validates `block_size`, `keep_ratio` and `max_blocks` of a selector.

    Args:
      selector: with these fields.
      forced: gives how many first and last blocks of a row are always in.

    Raises:
      ValueError: one line that names the field.
    """
    _options.integer(selector, "block_size", 1)
    if selector.keep_ratio is not None:
        _options.number(selector, "keep_ratio", 0, 1)
    if selector.max_blocks is not None:
        # Fewer would cut the diagonal off.
        _options.integer(selector, "max_blocks", sum(forced()))


def ratio_density(selector: Any, total: int, forced: tuple[int, int]) -> float | None:
    """Share of the causal blocks under `keep_ratio`; None without it."""
    if selector.keep_ratio is None:
        return None
    blocks = -(-total // selector.block_size)
    kept = _row_budgets(selector, blocks, forced)
    return float(kept.sum() / _budgets.seen(blocks).sum())


def choose(
    selector: Any,
    frame: Frame,
    score: jax.Array,
    wanted: jax.Array,
    forced: tuple[int, int],
) -> BlockLists:
    """Lists of the blocks that a method wants, or of a set share of the best.

    Args:
      selector: with `keep_ratio`, which takes this share of the causal blocks of each
        row by score, and `max_blocks`, the most blocks of a row, by score too.
      frame: of the call.
      score: float32 `[B, H, num_q, num_k]`, not negative.
      wanted: bool of that shape: what the method selects. Not read with `keep_ratio`.
      forced: how many first and last blocks of a row are always in, the diagonal too.

    Returns:
      Lists for each query head; those of query blocks without a real query hold the
      diagonal alone.
    """
    always, causal = frame.forced(*forced), frame.causal()
    most, width = selector.max_blocks, frame.num_k
    budget: Any = None
    if selector.keep_ratio is not None:
        table = _row_budgets(selector, frame.total, forced)
        budget, width = frame.at_rows(table), int(frame.of_prompt(table).max())
        words = causal
    else:
        words = (_words.pack(wanted) | always) & causal
        if most is not None and most < width:
            budget = width = most
    if budget is not None:
        column, row = np.arange(frame.num_k), jnp.asarray(frame.rows)[:, None, :, None]
        key = jnp.minimum(_words.order32(jnp.maximum(score, 0.0)) + 1, _TOP - 1)
        if selector.keep_ratio is None:
            key = jnp.where(wanted, key, 0)
        key = jnp.where((column < forced[0]) | (column > row - forced[1]), _TOP, key)
        # Made once: the search passes over it several times.
        key = jax.lax.optimization_barrier(jnp.where(column <= row, key, 0))
        budget = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), key.shape[:-1])
        words &= _words.best(key, budget)
    return frame.lists(words, width)


def best(priority: jax.Array, budget: jax.Array) -> jax.Array:
    """The `budget` highest entries of each short row; of equals the first.

    Args:
      priority: float32 `[..., n]`, not negative; infinite comes first.
      budget: int32 `[...]`, from 0 on.

    Returns:
      bool `[..., n]`.
    """
    rank = jnp.argsort(jnp.argsort(-priority, -1), -1)
    return rank < budget[..., None]


def _row_budgets(selector: Any, blocks: int, forced: tuple[int, int]) -> np.ndarray:
    least = _budgets.forced(blocks, *forced)
    budgets = _budgets.shares(blocks, selector.keep_ratio, least)
    most = selector.max_blocks
    return budgets if most is None else np.minimum(budgets, most)
