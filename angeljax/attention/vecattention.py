"""`VecAttention`: keys near the best one of their row, in blocks (arXiv 2603.29494)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention._grid import (
    CHUNK_BYTES,
    Grid,
    block_means,
    make_grid,
)
from angeljax.attention._rows import check_options, ratio_density, to_lists
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
      sink: first tokens that are always read, in whole blocks; the original has one
        query block.
      window: nearest tokens that are always read, in whole blocks.
      keep_ratio: keep this share of the causal blocks of each row, by their best key,
        in place of the threshold.
      max_blocks: most blocks of a row, by their best key; the width of the lists.

    Example:
      >>> import jax
      >>> from angeljax.attention._selector import Place
      >>> from angeljax.attention.vecattention import VecAttention
      >>> q = jax.random.normal(jax.random.key(0), (1, 512, 4, 16))
      >>> selector = VecAttention(block_size=64, window=64, threshold=0.0)
      >>> selector.select(q, q, q, Place()).counts[0, 0].tolist()
      [1, 2, 3, 4, 5, 6, 7, 8]
    """

    threshold: float = 0.1
    block_size: int = 128
    sink: int = 64
    window: int = 1024
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, not {self.threshold!r}")
        for name in ("sink", "window"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer from 0 on, not {value!r}")
        check_options(self, lambda: self._always)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """See `Selector.select`."""
        del v
        grid = make_grid(q, k, place, self.block_size)
        score = best_key_scores(q, k, grid)
        gap = -math.log(self.threshold) if self.threshold else math.inf
        forced = (jnp.arange(grid.num_k) < self._sink) | (grid.distance < self._window)
        return to_lists(
            score,
            score + gap >= score.max(-1, keepdims=True),
            forced,
            grid,
            always=self._always,
            keep_ratio=self.keep_ratio,
            max_blocks=self.max_blocks,
        )

    def density(self, total: int, **place: Any) -> float | None:
        """See `Selector.density`."""
        del place
        if self.keep_ratio is not None:
            return ratio_density(
                total, self.block_size, self.keep_ratio, self._always, self.max_blocks
            )
        return 1.0 if not self.threshold and self.max_blocks is None else None

    @property
    def _sink(self) -> int:
        return max(1, -(-self.sink // self.block_size))

    @property
    def _window(self) -> int:
        # The band begins that many tokens before the query block.
        return 1 + -(-self.window // self.block_size)

    @property
    def _always(self) -> int:
        return self._sink + self._window


def best_key_scores(q: jax.Array, k: jax.Array, grid: Grid) -> jax.Array:
    """float32 `[B, H, n_q, n_k]`: greatest score of a key of each block.

    Keys ahead of the last query of a block do not count; a block without any other has
    the lowest number there is.
    """
    batch, _, heads, dim = q.shape
    kv_heads, size = k.shape[2], k.shape[1]
    means = block_means(q, grid.end - grid.start, grid.block).astype(q.dtype)
    means = means.reshape(*means.shape[:2], kv_heads, -1, dim)
    low = jnp.finfo(jnp.float32).min

    def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        mean, own = args
        x = jnp.einsum(
            "bngd,bsnd->bngs", mean, k,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip
        seen = jnp.arange(size) < jnp.minimum((own + 1) * grid.block, grid.end)[:, None]
        x = jnp.where(seen[:, None, None], x * dim**-0.5, low)
        tail = ((0, 0),) * 3 + ((0, -size % grid.block),)
        x = jnp.pad(x, tail, constant_values=low)
        x = x.reshape(*x.shape[:3], grid.num_k, grid.block).max(-1)
        return x.reshape(batch, heads, grid.num_k)

    at_once = CHUNK_BYTES // (4 * batch * heads * size)
    score = jax.lax.map(
        one,
        (jnp.moveaxis(means, 1, 0), grid.own.T),
        batch_size=max(1, min(at_once, grid.num_q)),
    )
    return jnp.moveaxis(score, 0, 2)
