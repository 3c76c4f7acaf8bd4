"""Attention of short runs of queries on a shared context and on keys of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# What masked scores become; finite, so that a context of no tokens is no NaN.
_UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    q: jax.Array,
    context: tuple[jax.Array, jax.Array],
    seen: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention of A runs over one context, each with its own keys besides.

    Packed into one row with a mask, the keys of A runs would be scored against the
    queries of all of them, A times what is looked at.

    Args:
      q: `[B, A, J, H, D]`, of A runs of J queries.
      context: keys and values `[B, Hkv, S, D]`.
      seen: bool `[B or 1, A, S]`, what of the context a run sees.
      own: keys and values `[B, A, I, Hkv, D]`, which only queries of the same run see.

    Returns:
      `[B, A, J, H, D]`.
    """
    batch, runs, count, heads, dim = q.shape
    k, v = (x.astype(q.dtype) for x in context)
    q = q.reshape(batch, runs, count, k.shape[1], -1, dim)
    wide: dict[str, Any] = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bajkgd,bksd->bakgjs", q, k, **wide)
    scores = jnp.where(seen[:, :, None, None, None], scores, _UNSEEN)
    if own is None:
        weights = jax.nn.softmax(scores * dim**-0.5, axis=-1).astype(q.dtype)
        y = jnp.einsum("bakgjs,bksd->bajkgd", weights, v, **wide)
        return y.reshape(batch, runs, count, heads, dim).astype(weights.dtype)
    own_k, own_v = (x.astype(q.dtype) for x in own)
    mine = jnp.einsum("bajkgd,baikd->bakgji", q, own_k, **wide)
    scores = jnp.concatenate([scores, mine], axis=-1) * dim**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    size = k.shape[2]
    y = jnp.einsum("bakgjs,bksd->bajkgd", weights[..., :size], v, **wide)
    y += jnp.einsum("bakgji,baikd->bajkgd", weights[..., size:], own_v, **wide)
    return y.reshape(batch, runs, count, heads, dim).astype(weights.dtype)
