"""`FlashPrefill`: blocks near the best one of their row (arXiv 2603.06199)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention._grid import (
    CHUNK_BYTES,
    Grid,
    block_means,
    in_blocks,
    make_grid,
)
from angeljax.attention._rows import check_options, ratio_density, to_lists
from angeljax.attention._selector import Place
from pallas_kernels import BlockLists


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashPrefill:
    """Scores with mean keys, and a threshold relative to the row's best block.

    A key block J is stood for by the mean of its keys, and the score of a query block I
    is the share of J in

        sum over i in I of exp(q_i . mean(k_J) / sqrt(D))

    over the blocks that query i sees whole (arXiv 2603.06199, sections 3.1 to 3.4). A
    block is kept if its score is at least `alpha` times the best of its row; so are the
    first and the nearest blocks, and every block of the last `last_n_block_full` query
    blocks. No sort and no running sum. Lists are per query head. The softmax over the
    blocks holds 256 MiB at once, or what one query block needs.

    Chunks of a prompt select what the prompt would in one piece if `place.total` or
    `place.lengths` tells where it ends; `mean_correction` adds what was left out.

    Attributes:
      alpha: from 0 (all blocks) to 1 (the best one).
      block_size: rows of a block.
      sink: first tokens that are always read, in whole blocks, at least one.
      window: nearest tokens that are always read, likewise.
      last_n_block_full: last query blocks that read everything; not with `keep_ratio`.
      keep_ratio: keep this share of the causal blocks of each row, by score, in place
        of the threshold.
      max_blocks: most blocks of a row, by score; the width of the lists.

    Example:
      >>> import jax
      >>> from angeljax.attention._selector import Place
      >>> from angeljax.attention.flashprefill import FlashPrefill
      >>> q = jax.random.normal(jax.random.key(0), (1, 512, 4, 16))
      >>> selector = FlashPrefill(block_size=64, sink=64, window=64, keep_ratio=0.5)
      >>> lists = selector.select(q, q[:, :, :2], q[:, :, :2], Place())
      >>> lists.counts[0, 0].tolist()
      [1, 2, 2, 2, 3, 3, 4, 4]
    """

    alpha: float = 0.2
    block_size: int = 128
    sink: int = 256
    window: int = 512
    last_n_block_full: int = 2
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {self.alpha!r}")
        for name in ("sink", "window", "last_n_block_full"):
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
        score = mean_key_scores(q, k, grid)
        total = jnp.int32(place.total or k.shape[1])
        if place.lengths is not None:
            total = jnp.minimum(total, place.lengths)
        blocks = -(-total // self.block_size)
        full = grid.own >= jnp.reshape(blocks - self.last_n_block_full, (-1, 1))
        wanted = score >= self.alpha * score.max(-1, keepdims=True)
        distance = grid.distance
        forced = (jnp.arange(grid.num_k) < self._sink) | (distance < self._window)
        return to_lists(
            score,
            wanted | full[:, None, :, None],
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
        return 1.0 if not self.alpha and self.max_blocks is None else None

    @property
    def _sink(self) -> int:
        return max(1, self.sink // self.block_size)

    @property
    def _window(self) -> int:
        return max(1, self.window // self.block_size)

    @property
    def _always(self) -> int:
        return self._sink + self._window


def mean_key_scores(q: jax.Array, k: jax.Array, grid: Grid) -> jax.Array:
    """float32 `[B, H, n_q, n_k]`: share of each block, as `FlashPrefill` has it."""
    batch, t, heads, dim = q.shape
    kv_heads = k.shape[2]
    real = jnp.arange(t) < (grid.end - grid.start)[:, None]
    q = jnp.where(real[..., None, None], q, 0)
    rows = in_blocks(q.reshape(batch, t, kv_heads, -1, dim), grid.block)
    means = block_means(k, grid.end, grid.block).astype(q.dtype)
    # The last key of each block must not lie ahead of the query.
    ends = (jnp.arange(grid.num_k) + 1) * grid.block - 1
    inside = jnp.arange(grid.block)

    def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, own = args
        e = jnp.einsum(
            "brngd,bjnd->bngrj", rows, means,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip
        position = own[:, None] * grid.block + inside
        seen = ends <= position[..., None]
        seen = (seen & (position < grid.end[:, None])[..., None])[:, None, None]
        e = jnp.where(seen, e * dim**-0.5, -jnp.inf)
        top = e.max((-2, -1), keepdims=True)
        p = jnp.exp(e - jnp.where(jnp.isfinite(top), top, 0)).sum(-2)
        p = p / (p.sum(-1, keepdims=True) + 1e-9)
        return p.reshape(batch, heads, grid.num_k)

    at_once = CHUNK_BYTES // (4 * batch * heads * grid.block * grid.num_k)
    score = jax.lax.map(
        one,
        (jnp.moveaxis(rows, 1, 0), grid.own.T),
        batch_size=max(1, min(at_once, grid.num_q)),
    )
    return jnp.moveaxis(score, 0, 2)
