"""The gradient of block-sparse attention, over the same lists.

One walk over the lists of the queries recomputes the weights of a few blocks at a time
and adds to dQ in place, to dK and dV by a scatter of whole blocks (FlashAttention-2,
arXiv 2307.08691, algorithm 2, with the loops exchanged). The other way, a second walk
over transposed lists, computes logits and weights twice and needs lists as wide as
there are query blocks, since any block may be in all of them; on a CPU it took 1.35
times as long (4096 tokens, density 0.35). The price is that a GPU adds in no fixed
order: dK and dV are the same up to rounding in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import _walk
from pallas_kernels.block_sparse_attention._lists import BlockLists


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    y: jax.Array,
    lse: jax.Array,
    dy: jax.Array,
    dlse: jax.Array,
    *,
    scale: float,
    q_offset: jax.Array,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and v.

    Args:
      q, k, v, lists, q_offset, scale, soft_cap: as in the forward pass.
      y, lse: its results.
      dy, dlse: their cotangents.

    Returns:
      dq, dk and dv in the shapes and dtypes of q, k and v. What a query that sees no
      key is given as a cotangent is not read.
    """
    heads, kv_heads = _walk.list_heads(q, k, lists), k.shape[2]
    some = (lse > -jnp.inf).transpose(0, 2, 1)[..., None]  # [B, T, H, 1]
    dy = jnp.where(some, dy, 0).astype(q.dtype)
    # dS = P * (dY V^T - delta): the softmax takes off its mean, lse adds its own part.
    delta = jnp.sum(dy.astype(jnp.float32) * y, axis=-1, keepdims=True)
    delta = jnp.where(some, delta - dlse.transpose(0, 2, 1)[..., None], 0.0)
    lse = jnp.where(some, lse.transpose(0, 2, 1)[..., None], jnp.inf)

    def start(q: jax.Array, *rows: Any) -> Any:
        del rows
        return jnp.zeros_like(q, jnp.float32)

    def visit(dq: Any, total: Any, rows: Any, *keys: Any) -> Any:
        (q, dy, lse, delta), (k, v, seen, at), (dk, dv) = rows, keys, total
        s, slope = _walk.logits(q, k, seen, scale, soft_cap)
        p = jnp.exp(s - lse)
        ds = jnp.where(seen, p * (_walk.dot(dy, v, 2, 2) - delta) * slope, 0.0)
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)

        def add(total: jax.Array, x: jax.Array) -> jax.Array:
            x = x.reshape(-1, *total.shape[1:])
            return total.at[at.reshape(-1)].add(x, mode="drop")

        dk, dv = add(dk, _walk.dot(ds, q, 1, 1)), add(dv, _walk.dot(p, dy, 1, 1))
        return dq + _walk.dot(ds, k, 2, 1), (dk, dv)

    keys = tuple(_walk.blocks(x, kv_heads, lists.block_k) for x in (k, v))
    zeros = jnp.zeros_like(keys[0], jnp.float32)
    dq, (dk, dv) = _walk.walk(
        tuple(_walk.blocks(x, heads, lists.block_q) for x in (q, dy, lse, delta)),
        (keys[0], keys[1]),
        lists,
        q_offset,
        kv_heads,
        start,
        visit,
        lambda dq: (dq * scale).astype(q.dtype),
        (zeros, zeros),
    )
    dq = _walk.unblock(dq, q.shape, heads, lists.block_q)
    dk, dv = (
        _walk.unblock(x, k.shape, kv_heads, lists.block_k).astype(k.dtype)
        for x in (dk * scale, dv)
    )
    return dq, dk, dv
