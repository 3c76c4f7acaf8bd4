"""The definition: softmax over a mask of all keys, in float32. Quadratic memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

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
    """See `_call`; differentiable by itself."""
    seen = token_mask(lists, q.shape, k.shape, q_offset)
    group = q.shape[2] // k.shape[2]
    q32 = q.astype(jnp.float32)
    k32, v32 = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q32, k32, precision="highest") * scale
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(seen, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    # A row that sees nothing gives zeros; the inner `where` keeps its gradient finite.
    some = jnp.isfinite(lse)
    p = jnp.where(seen, jnp.exp(s - jnp.where(some, lse, 0.0)[..., None]), 0.0)
    y = jnp.einsum("bhts,bshd->bthd", p, v32, precision="highest")
    return y.astype(q.dtype), lse


def token_mask(
    lists: BlockLists, q_shape: Any, k_shape: Any, q_offset: jax.Array
) -> jax.Array:
    """bool `[B, heads, T, S]`: which key each query sees."""
    (batch, t, heads, _), s = q_shape, k_shape[1]
    mask = lists.to_mask(-(-s // lists.block_k))
    mask = jnp.repeat(mask, heads // mask.shape[1], axis=1)
    rows, columns = jnp.arange(t), jnp.arange(s)
    mask = mask[:, :, rows // lists.block_q][..., columns // lists.block_k]
    position = rows + q_offset[:, None]
    causal = columns <= position[..., None]
    return jnp.broadcast_to(mask & causal[:, None], (batch, heads, t, s))
