"""Which rows of a ragged product a program instance takes, and of which expert.

Rows are sorted by expert and are taken in windows of `block` rows, each for one expert:
a *visit*. The rows of an expert begin and end anywhere in a window; how many visits
there are is known on the device only, so there are as many as there could be, and what
is left over of them is empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visit_bound(rows: int, experts: int, block: int, align: int = 1) -> int:
    """The most visits that any sizes of the groups need."""
    # Rows of no expert are one more group. A group of s rows that begins `align - 1`
    # after the start of its window takes ceil((s + align - 1) / block) of them.
    groups = min(experts + 1, rows)
    return groups + (rows + (align - 2) * groups) // block


def visits(
    group_sizes: jax.Array, rows: int, block: int, align: int = 1
) -> tuple[jax.Array, jax.Array]:
    """All visits in the order of the rows.

    Args:
      group_sizes: int32 `[E]`.
      rows: of the product; those past the sum of `group_sizes` belong to expert E.
      block: rows of a window.
      align: windows start at multiples of it. With 1 they also end within the rows, of
        which there must be `block` then.

    Returns:
      int32 `[V, 4]`: expert, start of the window, and the rows `lo` to `hi` of the
      window that are meant; `lo == hi` in what is left over. The number of visits of
      experts below E, int32; they come first.
    """
    experts = group_sizes.shape[0]
    bound = visit_bound(rows, experts, block, align)
    ends = jnp.minimum(_running_sum(group_sizes), rows)
    ends = jnp.append(ends, rows)
    starts = jnp.roll(ends, 1).at[0].set(0)
    begin = starts // align * align
    each = jnp.where(ends > starts, -((begin - ends) // block), 0)
    stops = _running_sum(each)
    i = jnp.arange(bound, dtype=jnp.int32)
    expert = jnp.sum(stops <= i[:, None], axis=1, dtype=jnp.int32)
    empty = expert > experts
    expert = jnp.minimum(expert, experts)
    first = begin[expert] + (i - (stops - each)[expert]) * block
    lo = jnp.maximum(starts[expert] - first, 0)
    hi = jnp.minimum(ends[expert] - first, block)
    if align == 1:
        back = first - jnp.minimum(first, rows - block)
        first, lo, hi = first - back, lo + back, hi + back
    window = jnp.stack([first, lo, hi], axis=1)
    window = jnp.where(empty[:, None], 0, window)
    table = jnp.concatenate([expert[:, None], window], axis=1).astype(jnp.int32)
    return table, stops[experts - 1].astype(jnp.int32)


def _running_sum(x: jax.Array) -> jax.Array:
    """`cumsum` of a few numbers as one reduction, which XLA fuses on a GPU."""
    i = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(i <= i[:, None], x, 0), axis=1, dtype=jnp.int32)
