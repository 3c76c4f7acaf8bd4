"""`FlashPrefill`: blocks near the best one of their row (arXiv 2603.06199)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _choose, _options
from angeljax.attention._estimate import (
    by_parts,
    key_means,
    products,
    rows_of_part,
    whole_blocks,
)
from angeljax.attention._frame import Frame, make_frame
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
    first and the nearest blocks, and every block of the last `last_blocks` query
    blocks. No sort and no running sum. Lists are per query head. The softmax over the
    blocks holds 256 MiB at once, or what one query block needs.

    Chunks of a prompt select what the prompt would in one piece if `place.total` or
    `place.lengths` tells where it ends; `mean_correction` adds what was left out.

    Attributes:
      alpha: from 0 (all blocks) to 1 (the best one).
      block_size: rows of a block.
      sink_tokens: first tokens that are always read, in whole blocks, at least one.
      window_tokens: nearest tokens that are always read, likewise.
      last_blocks: last query blocks, which read everything; not with `keep_ratio`.
      keep_ratio: keep this share of the causal blocks of each row, by score, in place
        of the threshold.
      max_blocks: most blocks of a row, by score; the width of the lists.

    Example:
      >>> import jax
      >>> from angeljax.attention import FlashPrefill, Place
      >>> q = jax.random.normal(jax.random.key(0), (1, 512, 4, 16))
      >>> selector = FlashPrefill(
      ...     block_size=64, sink_tokens=64, window_tokens=64, keep_ratio=0.5
      ... )
      >>> lists = jax.jit(lambda q, k: selector.select(q, k, k, Place()))(q, q)
      >>> lists.counts[0, 0].tolist()
      [1, 2, 2, 2, 3, 3, 4, 4]
    """

    alpha: float = 0.2
    block_size: int = 128
    sink_tokens: int = 256
    window_tokens: int = 512
    last_blocks: int = 2
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {self.alpha!r}")
        for name in ("sink_tokens", "window_tokens", "last_blocks"):
            _options.integer(self, name, 0)
        _choose.check(self, lambda: self._forced)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """See `Selector.select`."""
        frame = make_frame(q, k, v, place, self.block_size)
        score = mean_key_scores(frame, q, frame.real_keys(k))
        total: Any = frame.total
        if place.lengths is not None:
            blocks = -(-jnp.asarray(place.lengths) // self.block_size)
            total = jnp.minimum(jnp.reshape(blocks, (-1, 1)), total)
        full = jnp.asarray(frame.rows) >= total - self.last_blocks
        wanted = score >= self.alpha * score.max(-1, keepdims=True)
        wanted |= full[:, None, :, None]
        return _choose.choose(self, frame, score, wanted, self._forced)

    def density(self, total: int, **place: Any) -> float | None:
        """See `Selector.density`."""
        if not self.alpha and self.keep_ratio is None and self.max_blocks is None:
            return 1.0
        return _choose.ratio_density(self, total, self._forced)

    @property
    def _forced(self) -> tuple[int, int]:
        """First and last blocks that are always read."""
        block = self.block_size
        return max(1, self.sink_tokens // block), max(1, self.window_tokens // block)


def mean_key_scores(frame: Frame, q: jax.Array, k: jax.Array) -> jax.Array:
    """float32 `[B, H, num_q, num_k]`: share of each block, as `FlashPrefill` has it.

    Args:
      frame: of the call.
      q: `[B, T, H, D]`.
      k: `[B, S, Hkv, D]`, zeros in rows that are not real.
    """
    batch, _, heads, dim = q.shape
    q = whole_blocks(frame.real_queries(q), frame.block)
    rows, inside = jnp.asarray(frame.rows), np.arange(frame.block)
    means = key_means(frame, k).astype(q.dtype)
    # The last key of each block must not lie ahead of the query.
    ends = (np.arange(frame.num_k) + 1) * frame.block - 1
    keys = jnp.reshape(jnp.asarray(frame.keys), (-1, 1, 1))

    def part(first: jax.Array, size: int) -> jax.Array:
        queries = rows_of_part(q, first, size, frame.block)
        queries = queries.reshape(*queries.shape[:3], k.shape[2], -1, dim)
        e = products("birngd,bjnd->ibngrj", queries, means)
        position = rows_of_part(rows, first, size) * frame.block + inside
        seen = (ends <= position[..., None]) & (position < keys)[..., None]
        seen = seen.swapaxes(0, 1)[:, :, None, None]
        e = jnp.where(seen, e * dim**-0.5, -jnp.inf)
        top = e.max((-2, -1), keepdims=True)
        p = jnp.exp(e - jnp.where(jnp.isfinite(top), top, 0)).sum(-2)
        p = p / (p.sum(-1, keepdims=True) + 1e-9)
        return p.reshape(size, batch, heads, frame.num_k)

    bytes_of_one = 4 * batch * heads * frame.block * frame.num_k
    return jnp.moveaxis(by_parts(part, frame.num_q, bytes_of_one), 0, 2)
