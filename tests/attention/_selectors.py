"""Selectors that are small enough to be checked by eye."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import Place
from pallas_kernels import BlockLists


@dataclasses.dataclass(frozen=True)
class Means:
    """The `keep` likeliest key blocks by mean query and mean key, and the diagonal.

    What a block selects depends on its own queries and the keys before it alone, so
    that a prompt in chunks selects what it does in one piece. keep=0 keeps every block.
    """

    block_size: int = 16
    keep: int = 2
    says: float | None = None

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        b = self.block_size
        q = self._blocks(q, place.lengths, place.q_offset)
        k = self._blocks(k, place.lengths, 0)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        score = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest")
        first = jnp.broadcast_to(jnp.asarray(place.q_offset), q.shape[:1]) // b
        row = (first[:, None] + jnp.arange(q.shape[1]))[:, None, :, None]
        column = jnp.arange(k.shape[1])
        score = jnp.where(column < row, score, -jnp.inf)
        # Counting compiles faster than sorting.
        rank = jnp.sum(score[..., None, :] > score[..., None], axis=-1)
        few = (rank < self.keep) | (self.keep == 0)
        mask = ((column < row) & few) | (column == row)
        return BlockLists.from_mask(mask, block_q=b, block_k=b)

    def _blocks(self, x: jax.Array, lengths: Any, offset: Any) -> jax.Array:
        """Means; padding counts as zeros."""
        b, rows = self.block_size, x.shape[1]
        if lengths is not None:
            position = jnp.arange(rows) + jnp.asarray(offset)[..., None]
            x = jnp.where((position < lengths[:, None])[..., None, None], x, 0)
        x = jnp.pad(x, ((0, 0), (0, -rows % b), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], -1, b, *x.shape[2:]).mean(2, dtype=jnp.float32)

    def density(self, total: int, **place: Any) -> float | None:
        return self.says


def attention(q: Any, k: Any, v: Any, blocks: Any, size: int, offset: Any = 0) -> Any:
    """Softmax over listed blocks, one query at a time.

    Args:
      q, k, v: one row of the batch, `[T, H, D]` and `[S, Hkv, D]`.
      blocks: bool `[H, num_q_blocks, num_k_blocks]`, blocks counted from position 0.
      size: of a block.
      offset: position of the first query.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    blocks = np.asarray(blocks)
    group = q.shape[1] // k.shape[1]
    y = np.zeros_like(q)
    for h in range(q.shape[1]):
        for t in range(q.shape[0]):
            row = (t + offset) // size - offset // size
            keys = [j for j in range(t + offset + 1) if blocks[h, row, j // size]]
            logits = k[keys, h // group] @ q[t, h] / np.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            y[t, h] = weights @ v[keys, h // group] / weights.sum()
    return y
