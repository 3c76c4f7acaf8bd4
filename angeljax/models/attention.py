"""Softmax attention with grouped queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._devices import has_flash

# Rows times slots of the cache up to which a decode step multiplies and sums. A longer
# cache should not be read once for each query of a group.
_SHORT = 1024
# What `jax.nn.dot_product_attention` puts where a query sees nothing.
_UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention with grouped queries; softmax in float32.

    Args:
      q: `[B, T, num_heads, head_dim]`.
      k, v: `[B, S, num_kv_heads, head_dim]`.
      mask: bool `[B, 1, T, S]`, True where a query sees a key.

    Returns:
      `[B, T, num_heads, head_dim]`.
    """
    if q.shape[1] == 1 and q.shape[0] * k.shape[1] <= _SHORT:
        return jax.lax.platform_dependent(
            q, k, v, mask, cuda=token_attention, default=_attention
        )
    return _attention(q, k, v, mask)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Softmax attention of full rows, every query on all keys up to its own.

    The `attention_fn` for training: on a GPU, with 16-bit operands, it is cuDNN's flash
    attention, which stores no weights `[T, S]`; elsewhere the softmax of XLA. A decoder
    uses it where its rows are full and start at position 0, and `dense_attention` where
    there is a cache, padding or a window.

    Args:
      q: `[B, T, num_heads, head_dim]`.
      k, v: `[B, T, num_kv_heads, head_dim]`.
      mask: not looked at, so that nothing materialises it.

    Returns:
      `[B, T, num_heads, head_dim]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.models import causal_attention
      >>> x = jnp.ones((1, 4, 2, 8))
      >>> causal_attention(x, x, x).shape
      (1, 4, 2, 8)
    """
    # Decided while tracing: a choice while lowering (`platform_dependent`) would keep
    # the residuals of both branches for the backward pass.
    flash = has_flash() and q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn" if flash else None
    )


def token_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """`dense_attention` of one token for each row, without matrix products.

    On a GPU XLA makes two kernels of it: the scores, with what precedes the queries,
    and softmax with the sum over values. Products of matrices would be kernels of their
    own, each of which takes longer to start than to run.
    """
    batch, _, heads, dim = q.shape
    groups = (batch, k.shape[2], -1, 1, dim)
    q = q.reshape(groups).astype(jnp.float32)
    keys, values = (
        jnp.swapaxes(x, 1, 2)[:, :, None].astype(jnp.float32) for x in (k, v)
    )
    scores = jnp.sum(q * keys, axis=-1) * dim**-0.5  # [B, Hkv, G, S]
    weights = jax.nn.softmax(jnp.where(mask, scores, _UNSEEN), axis=-1)
    y = jnp.sum(weights[..., None] * values, axis=-2)
    return y.reshape(batch, 1, heads, dim).astype(v.dtype)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def attend_mask(queries: jax.Array, keys: jax.Array, window: Any) -> jax.Array:
    """bool `[B, 1, T, S]`: which key each query sees; window 0 sees all before it."""
    distance = queries[:, :, None] - keys[:, None, :]
    seen = (keys[:, None, :] >= 0) & (distance >= 0)
    near = (distance < window) | (jnp.asarray(window) == 0)
    return (seen & near)[:, None]
