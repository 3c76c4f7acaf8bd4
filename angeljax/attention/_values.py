"""What Stem adds to the scores of keys with large values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from angeljax.attention import _words
from angeljax.attention._frame import Frame, strided

# Query blocks, number of key blocks -> float32 [B, Hkv, query blocks or 1, key blocks].
Bonus = Callable[[slice, int], jax.Array]


def value_bonus(
    frame: Frame,
    v: jax.Array,
    *,
    stride: int,
    weight: float,
    form: str,
    stats: str,
    valid_mean: bool,
) -> Bonus:
    """The bonus of each key block, for a key head; see `Stem`.

    Args:
      frame: of the call.
      v: `[B, S, Hkv, D]`, zeros where a row is not real.
      stride, weight, form, stats, valid_mean: options of `Stem`.

    Returns:
      A function that gives the part of it that is asked for.
    """
    norms = jnp.sqrt(jnp.sum(jnp.square(v.astype(jnp.float32)), -1))
    if form == "paper":
        tall = strided(norms, frame.block, frame.block).max((2, 3))
        rise = jnp.maximum(jnp.log(jnp.maximum(tall, 1e-6)), 0) * weight
        rise = rise.transpose(0, 2, 1)[:, :, None]
        return lambda rows, size: rise[..., :size]
    # A cell is a stride of keys, and has the largest of its norms.
    cells = jnp.log(strided(norms, frame.block, stride).max(3) + 1e-6)
    cells = cells.transpose(2, 0, 3, 1)  # [cells of a block, B, Hkv, num_k]
    mean, deviation = _statistics(frame, cells, stride, stats)
    share = weight / _cells(frame, len(cells), stride, valid_mean)

    def bonus(rows: slice, size: int) -> jax.Array:
        part = rows if mean.shape[2] > 1 else slice(None)
        above = cells[:, :, :, None, :size] - mean[:, :, part, None]
        raised = jnp.sum(jnp.maximum(above, 0), 0)
        raised = raised / (deviation[:, :, part, None] + 1e-6)
        # Made once for a key head, not again for each of its query heads.
        return lax.optimization_barrier(raised * share[:, None, None, :size])

    return bonus


def _statistics(
    frame: Frame, cells: jax.Array, stride: int, stats: str
) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased deviation of whole cells, `[B, Hkv, num_q or 1]` each."""
    number = np.arange(frame.num_k) * len(cells) + np.arange(len(cells))[:, None]
    # Known while tracing where the lengths are: then nothing of it runs.
    known = isinstance(frame.keys, int)
    keys = np.full(1, frame.keys) if known else jnp.reshape(frame.keys, -1)
    whole: Any = number[:, None, None] < keys[:, None, None] // stride
    # About the first cell, which all chunks of a prompt have.
    origin = cells[0, :, :, :1]
    x = jnp.where(whole, cells - origin, 0)
    seen = np.arange(frame.num_k) <= frame.rows[:, None, :, None]
    parts = x.sum(0), jnp.square(x).sum(0)
    count = whole.astype(np.float32).sum(0)
    if stats == "prompt":
        first, second = (s.sum(-1, keepdims=True) for s in parts)
        count = count.sum(-1, keepdims=True)
    else:
        first, second = _words.sums([jnp.where(seen, s[:, :, None], 0) for s in parts])
        count = (seen * count[:, :, None]).sum(-1)
    count = jnp.maximum(count, 1)
    spread = jnp.maximum(second - jnp.square(first) / count, 0)
    return origin + first / count, jnp.sqrt(spread / jnp.maximum(count - 1, 1))


def _cells(frame: Frame, cells: int, stride: int, valid_mean: bool) -> jax.Array:
    """By how many cells the bonus of a block is divided, `[1 or B, num_k]`."""
    rows = frame.rows_of(frame.num_k, False) if valid_mean else None
    if rows is None:
        return jnp.full((1, frame.num_k), float(cells))
    return jnp.maximum(jnp.ceil(rows / stride), 1)
