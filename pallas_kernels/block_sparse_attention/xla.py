"""Block-sparse attention in plain XLA: listed blocks are gathered, a few at a time.

Runs anywhere. Work follows the lists; memory is that of `q`, `k` and `v` once more,
and of one visit of `_walk`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import _walk
from pallas_kernels.block_sparse_attention._lists import BlockLists


def unsupported(q: Any, k: Any, v: Any, lists: BlockLists) -> str | None:
    """Why this cannot run here, or None."""
    del q, k, v, lists
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    *,
    scale: float,
    q_offset: jax.Array,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `_call`. Not differentiable by itself: its loops end where the lists do."""
    heads = _walk.list_heads(q, k, lists)

    def start(q: jax.Array) -> Any:
        sums = jnp.zeros_like(q, jnp.float32)
        return jnp.full_like(sums[..., 0], -jnp.inf), sums[..., 0], sums

    def visit(state: Any, total: Any, rows: Any, *keys: Any) -> Any:
        top, weight, sums = state
        k, v, seen, _ = keys
        s, _ = _walk.logits(rows[0], k, seen, scale, soft_cap)
        new = jnp.maximum(top, jnp.max(s, axis=-1))
        # A row that has seen nothing yet stays at -inf, without -inf less -inf.
        base = jnp.where(new == -jnp.inf, 0.0, new)
        p, fade = jnp.exp(s - base[..., None]), jnp.exp(top - base)
        weight = weight * fade + jnp.sum(p, axis=-1)
        sums = sums * fade[..., None] + _walk.dot(p.astype(v.dtype), v, 2, 1)
        return (new, weight, sums), total

    def finish(state: Any) -> Any:
        top, weight, sums = state
        some = weight > 0
        weight = jnp.where(some, weight, 1.0)
        y = jnp.where(some[..., None], sums / weight[..., None], 0.0)
        return y.astype(q.dtype), jnp.where(some, top + jnp.log(weight), -jnp.inf)

    (y, lse), _ = _walk.walk(
        (_walk.blocks(q, heads, lists.block_q),),
        (
            _walk.blocks(k, k.shape[2], lists.block_k),
            _walk.blocks(v, k.shape[2], lists.block_k),
        ),
        lists,
        q_offset,
        k.shape[2],
        start,
        visit,
        finish,
    )
    y = _walk.unblock(y, q.shape, heads, lists.block_q)
    shape = (*q.shape[:3], 1)
    lse = _walk.unblock(lse[..., None], shape, heads, lists.block_q)
    return y, lse[..., 0].transpose(0, 2, 1)
