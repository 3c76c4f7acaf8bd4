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
    kv_heads, size = k.shape[1:3]
    # `[B, Hkv, A, rows, D]`: on the context all runs are rows of one matrix. (XLA's
    # product of 16-bit numbers on a CPU takes no others.)
    q = q.reshape(batch, runs, count, kv_heads, -1, dim)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(batch, kv_heads, runs, -1, dim)
    wide: dict[str, Any] = {"preferred_element_type": jnp.float32}

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    def apart(x: jax.Array) -> jax.Array:
        return x.reshape(*q.shape[:4], -1)

    scores = apart(jnp.einsum("bkmd,bksd->bkms", flat(q), k, **wide))
    scores = jnp.where(seen[:, None, :, None], scores, _UNSEEN)
    if own is not None:
        own_k, own_v = (x.astype(q.dtype) for x in own)
        mine = jnp.einsum("bkand,baikd->bkani", q, own_k, **wide)
        scores = jnp.concatenate([scores, mine], axis=-1)
    weights = jax.nn.softmax(scores * dim**-0.5, axis=-1).astype(q.dtype)
    y = apart(jnp.einsum("bkms,bksd->bkmd", flat(weights[..., :size]), v, **wide))
    if own is not None:
        y += jnp.einsum("bkani,baikd->bkand", weights[..., size:], own_v, **wide)
    y = y.astype(q.dtype).reshape(batch, kv_heads, runs, -1, count, dim)
    return y.transpose(0, 2, 4, 1, 3, 5).reshape(batch, runs, count, heads, dim)
