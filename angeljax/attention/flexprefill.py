"""`FlexPrefill`: each head chooses its pattern and its budget (arXiv 2502.20766)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import rel_entr

from angeljax.attention import _choose
from angeljax.attention._estimate import (
    along,
    distance,
    ends,
    key_means,
    last_queries,
    products,
    query_means,
    split_last,
    tail_mass,
)
from angeljax.attention._frame import make_frame
from angeljax.attention._selector import Place
from pallas_kernels import BlockLists

# First and last blocks of a row that are always read.
_FORCED = 1, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill:
    """Vertical-slash heads and query-aware heads, told apart for each prompt.

    From the softmax of the last `block_size` queries: the mass on each key (vertical)
    and at each distance (slash), averaged over the queries (arXiv 2502.20766, section 3
    and algorithms 1 to 4).

    - A head is query-aware if the block means of its keys predict that mass:
      sqrt(JS(softmax(mean(q) . mean(k_J) / sqrt(D)), vertical by blocks)) < `tau`.
    - Any other head reads the key blocks with the most vertical mass, c // block_size
      + 1 of them if c - 1 of its keys, best first, hold at most `gamma` of the mass;
      and likewise whole block diagonals. The distance s counts for the block diagonal
      s // block_size. The first block and the diagonal are always in.
    - A query-aware head takes the pooled softmax of all query blocks together and reads
      its greatest entries while they hold at most `gamma` of the whole, and
      `min_budget` of the above.

    Lists are per query head. Chunks of a prompt are selected by their own last queries
    and not by those of the prompt, so they differ from one piece.

    Attributes:
      gamma: share of the mass, from 0 to 1.
      tau: bound on the divergence; 0 makes no head query-aware.
      min_budget, max_budget: tokens of the vertical blocks, and of the slash blocks, in
        whole blocks.
      block_size: rows of a block, and how many queries are looked at.
      keep_ratio: keep this share of the causal blocks of each row in place of the
        budgets: by vertical plus slash mass, or by the pooled softmax.
      max_blocks: most blocks of a row, by the same scores; the width of the lists.

    Example:
      >>> import jax
      >>> from angeljax.attention import FlexPrefill, Place
      >>> q = jax.random.normal(jax.random.key(0), (1, 512, 4, 16))
      >>> selector = FlexPrefill(block_size=64, gamma=0.5, max_blocks=4)
      >>> lists = jax.jit(lambda q, k: selector.select(q, k, k, Place()))(q, q)
      >>> lists.indices.shape, int(lists.counts.max())
      ((1, 4, 8, 4), 4)
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int | None = None
    max_budget: int | None = None
    block_size: int = 128
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be from 0 to 1, not {self.gamma!r}")
        if not self.tau >= 0:
            raise ValueError(f"tau must be from 0 on, not {self.tau!r}")
        for name in ("min_budget", "max_budget"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(
                    f"{name} must be a positive integer or None, not {value!r}"
                )
        if (self.max_budget or 2**31) < (self.min_budget or 1):
            raise ValueError(
                f"max_budget={self.max_budget} is below min_budget={self.min_budget}"
            )
        _choose.check(self, lambda: _FORCED)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """See `Selector.select`."""
        block = self.block_size
        frame = make_frame(q, k, v, place, block)
        k = frame.real_keys(k)
        tail, *where = last_queries(frame, q, block)
        column, diagonal = tail_mass(tail, k, *where)
        vertical = split_last(column, block).sum(-1)
        slash = split_last(diagonal, block).sum(-1)

        means, keys = key_means(frame, k), ends(frame, q.shape[0])
        mean_tail = tail.astype(jnp.float32).sum(1, keepdims=True)
        mean_tail /= jnp.maximum(where[1].sum(-1), 1)[:, None, None, None]
        there = np.arange(frame.num_k) * block < jnp.maximum(keys, 1)[:, None, None]
        guess = jnp.where(there, _pooled(mean_tail, means)[:, :, 0], -jnp.inf)
        aware = _divergence(jax.nn.softmax(guess, -1), vertical) < self.tau  # [B, H]

        columns = self._taken(column, vertical, aware, keys)
        diagonals = self._taken(diagonal, slash, aware, keys)
        back = distance(frame)
        wanted = columns[:, :, None] | along(diagonals, back)
        score = vertical[:, :, None] + along(slash, back)
        if self.tau > 0:
            pooled = _pooled(query_means(frame, q), means)
            pooled = jax.nn.softmax(jnp.where(back >= 0, pooled, -jnp.inf), -1)
            pooled = jnp.where(frame.padding[..., None], 0, pooled)
            live = frame.num_q - frame.padding[:, 0].sum(-1)  # [1 or B]
            wanted |= self._covered(pooled, aware, live)
            score = jnp.where(aware[..., None, None], pooled, score)
        return _choose.choose(self, frame, score, wanted, _FORCED)

    def density(self, total: int, **place: Any) -> float | None:
        """See `Selector.density`."""
        return _choose.ratio_density(self, total, _FORCED)

    def _taken(
        self, mass: jax.Array, blocks: jax.Array, aware: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """bool `[B, H, num_k]`: columns, or diagonals, of each head."""
        size, count = self.block_size, blocks.shape[-1]
        held = jnp.cumsum(-jnp.sort(-mass, -1), -1)
        # Keys that are not there have no mass and would count where gamma is 1.
        there = np.arange(mass.shape[-1]) < keys[:, None, None]
        needed = ((held <= self.gamma) & there).sum(-1, dtype=jnp.int32) + 1
        least = -(-(self.min_budget or 1) // size)
        most = -(-(self.max_budget or count * size) // size)
        budget = jnp.where(aware, least, jnp.maximum(needed // size + 1, least))
        # The first block, and the diagonal, come before all others.
        return _choose.best(blocks.at[..., 0].set(jnp.inf), jnp.minimum(budget, most))

    def _covered(
        self, pooled: jax.Array, aware: jax.Array, live: jax.Array
    ) -> jax.Array:
        """bool `[B, H, num_q, num_k]`: greatest entries of query-aware heads."""
        shape = pooled.shape
        bound = jnp.broadcast_to(self.gamma * live[:, None], shape[:2])

        def head(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            flat, aware, bound = args

            def entries(flat: jax.Array) -> jax.Array:
                order = jnp.argsort(-flat)
                kept = jnp.cumsum(flat[order]) <= bound
                return (jnp.zeros_like(kept).at[order].set(kept)) & (flat > 0)

            return jax.lax.cond(
                aware, entries, lambda x: jnp.zeros(x.shape, bool), flat
            )

        # One head after the other: most are not query-aware and cost nothing.
        flat = pooled.reshape(-1, shape[2] * shape[3]), aware.ravel(), bound.ravel()
        return jax.lax.map(head, flat).reshape(shape)


def _pooled(rows: jax.Array, means: jax.Array) -> jax.Array:
    """Logits `[B, H, n, n_k]` of mean queries `[B, n, H, D]` and mean keys."""
    batch, n, heads, dim = rows.shape
    rows = rows.reshape(batch, n, means.shape[2], -1, dim)
    s = products("bingd,bjnd->bngij", rows, means)
    return s.reshape(batch, heads, n, -1) * dim**-0.5


def _divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Square root of the Jensen-Shannon divergence, in nats."""
    m = (p + q) / 2
    both = rel_entr(p, m) + rel_entr(q, m)
    return jnp.sqrt(jnp.maximum(both.sum(-1) / 2, 0))
