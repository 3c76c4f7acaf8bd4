"""What both TPU kernels do with the keys that are in VMEM: one step of softmax.

Queries of one or more heads stand above each other, [rows, D]. Logits are in units of
log2; running maximum and sum fill all lanes of [rows, 128].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Finite, so that a row that has seen nothing needs no case of its own.
_LOWEST = -1e30
_FAR = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The function of the logits, and the sizes of a tile. All static."""

    scale: float
    soft_cap: float | None
    rows: int
    dim: int

    def scratch(self) -> list[Any]:
        """Maximum, sum and output of a tile of queries."""
        shapes = [(self.rows, LANES), (self.rows, LANES), (self.rows, self.dim)]
        return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def reset(state: Any) -> None:
    """Before the first key."""
    peak, total, acc = state
    peak[...] = jnp.full_like(peak, _LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)


def update(
    softmax: Softmax,
    state: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array | None = None,
) -> None:
    """Adds keys.

    Args:
      softmax: the function.
      state: refs of `Softmax.scratch`.
      q: [rows, D].
      k, v: [keys, D].
      seen: bool [rows, keys], default all.
    """
    peak, total, acc = state
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    logits = jax.lax.dot_general(
        q, k, (((1,), (1,)), ((), ())),
        precision=exact, preferred_element_type=jnp.float32,
    )  # fmt: skip
    if softmax.soft_cap is None:
        logits = logits * (softmax.scale / math.log(2))
    else:
        cap = softmax.soft_cap
        logits = jnp.tanh(logits * (softmax.scale / cap)) * (cap / math.log(2))
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    before = peak[...]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp2(logits - _wide(now, logits.shape[1]))
    fade = jnp.exp2(before - now)
    peak[...] = now
    total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
    part = jnp.dot(
        weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32
    )
    acc[...] = acc[...] * _wide(fade, softmax.dim) + part


def _wide(x: jax.Array, lanes: int) -> jax.Array:
    """Numbers that fill all of 128 lanes, in more lanes."""
    if lanes % LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], lanes))
    return jnp.tile(x, (1, lanes // LANES))


def finish(state: Any, y: Any, lse: Any) -> None:
    """Writes y [heads, queries, D] and lse [1, rows] after the last key."""
    peak, total, acc = state
    some = total[...] > 0
    sums = jnp.where(some, total[...], 1.0)
    y[...] = (acc[...] / sums[:, :1]).reshape(y.shape).astype(y.dtype)
    value = peak[...] * math.log(2) + jnp.log(sums)
    lse[...] = jnp.where(some, value, -jnp.inf).T[:1]


def seen(
    positions: jax.Array, first: jax.Array, queries: int, softmax: Softmax
) -> jax.Array:
    """bool [rows, keys]: which of the keys at `positions` [1, keys] each row may see.

    Args:
      positions: int32.
      first: position of the first query.
      queries: rows of a head.
      softmax: gives the number of rows.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (softmax.rows, 1), 0)
    return positions <= first + jax.lax.rem(row, queries)


def positions(starts: list[jax.Array], block_k: int, count: jax.Array) -> jax.Array:
    """int32 [1, keys]: where the keys of some blocks stand, those not real far away.

    Args:
      starts: position of the first key of each block.
      block_k: keys of a block.
      count: keys that are real.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, len(starts) * block_k), 1)
    shift = jnp.full_like(lane, starts[0])
    for i, start in enumerate(starts[1:], 1):
        shift = jnp.where(lane >= i * block_k, start - i * block_k, shift)
    return jnp.where(lane < count, lane + shift, _FAR)
