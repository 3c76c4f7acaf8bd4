"""`VecAttention`: keys near the best one of their row, in blocks (arXiv 2603.29494)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _choose, _options
from angeljax.attention._estimate import by_parts, products, query_means, rows_of_part
from angeljax.attention._frame import Frame, make_frame
from angeljax.attention._selector import Place
from pallas_kernels import BlockLists


@dataclasses.dataclass(frozen=True, kw_only=True)
class VecAttention:
    """MinP over single keys, rounded up to blocks.

    The mean query of a block scores every single key, x_j = mean(q_I) . k_j / sqrt(D),
    and a key counts if its weight is at least `threshold` times the greatest of its
    row, that is x_j >= max x + ln(threshold) (arXiv 2603.29494). The original reads
    just these keys, gathered; here the whole block of each is read. No key that counts
    is lost by this, but its neighbours come along: the share of blocks is far above the
    share of keys, up to `block_size` times where the keys lie scattered. Lists are per
    query head; scores of all keys are held for 256 MiB of query blocks at once, or one.

    Chunks of a prompt select what the prompt would in one piece.

    Attributes:
      threshold: from 0 (all blocks) to 1 (the best key alone).
      block_size: rows of a block.
      sink_tokens: first tokens that are always read, in whole blocks; the original has
        one query block.
      window_tokens: tokens before the query block that are always read, in whole
        blocks.
      keep_ratio: keep this share of the causal blocks of each row, by their best key,
        in place of the threshold.
      max_blocks: most blocks of a row, by their best key; the width of the lists.

    Example:
      >>> import jax
      >>> from angeljax.attention import Place, VecAttention
      >>> q = jax.random.normal(jax.random.key(0), (1, 512, 4, 16))
      >>> selector = VecAttention(block_size=64, window_tokens=64, threshold=0.0)
      >>> lists = jax.jit(lambda q, k: selector.select(q, k, k, Place()))(q, q)
      >>> lists.counts[0, 0].tolist()
      [1, 2, 3, 4, 5, 6, 7, 8]
    """

    threshold: float = 0.1
    block_size: int = 128
    sink_tokens: int = 64
    window_tokens: int = 1024
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, not {self.threshold!r}")
        for name in ("sink_tokens", "window_tokens"):
            _options.integer(self, name, 0)
        _choose.check(self, lambda: self._forced)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """See `Selector.select`."""
        frame = make_frame(q, k, v, place, self.block_size)
        best = best_key_scores(frame, q, frame.real_keys(k))
        top = best.max(-1, keepdims=True)
        gap = -math.log(self.threshold) if self.threshold else math.inf
        # How far from the best, turned round: from 0 on, as scores must be.
        low = jnp.where(jnp.isfinite(best), best, jnp.inf).min(-1, keepdims=True)
        score = jnp.where(jnp.isfinite(best), best - low, 0)
        return _choose.choose(self, frame, score, best + gap >= top, self._forced)

    def density(self, total: int, **place: Any) -> float | None:
        """See `Selector.density`."""
        if not self.threshold and self.keep_ratio is None and self.max_blocks is None:
            return 1.0
        return _choose.ratio_density(self, total, self._forced)

    @property
    def _forced(self) -> tuple[int, int]:
        """First and last blocks that are always read."""
        block = self.block_size
        # The window begins that many tokens before the query block.
        return max(1, -(-self.sink_tokens // block)), 1 - (-self.window_tokens // block)


def best_key_scores(frame: Frame, q: jax.Array, k: jax.Array) -> jax.Array:
    """float32 `[B, H, num_q, num_k]`: greatest score of a key of each block.

    Keys ahead of the last query of a block do not count; -inf without any other.

    Args:
      frame: of the call.
      q: `[B, T, H, D]`.
      k: `[B, S, Hkv, D]`, zeros in rows that are not real.
    """
    batch, _, heads, dim = q.shape
    size, kv_heads = k.shape[1:3]
    means = query_means(frame, q).astype(q.dtype)
    means = means.reshape(batch, frame.num_q, kv_heads, -1, dim)
    keys = jnp.reshape(jnp.asarray(frame.keys), (-1, 1))
    rows = jnp.asarray(frame.rows)

    def part(first: jax.Array, count: int) -> jax.Array:
        mean = rows_of_part(means, first, count)[:, :, 0]
        x = products("bingd,bsnd->ibngs", mean, k)
        ends = (rows_of_part(rows, first, count)[..., 0] + 1) * frame.block
        ends = jnp.minimum(ends, keys)[..., None]  # [1 or B, count, 1]
        seen = (np.arange(size) < ends).swapaxes(0, 1)[:, :, None, None]
        x = jnp.where(seen, x * dim**-0.5, -jnp.inf)
        tail = ((0, 0),) * 4 + ((0, frame.num_k * frame.block - size),)
        x = jnp.pad(x, tail, constant_values=-jnp.inf)
        x = x.reshape(*x.shape[:4], frame.num_k, frame.block).max(-1)
        return x.reshape(count, batch, heads, frame.num_k)

    score = by_parts(part, frame.num_q, 4 * batch * heads * size)
    return jnp.moveaxis(score, 0, 2)
