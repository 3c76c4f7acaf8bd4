"""What methods of selection share: the best of a row, ranks, scores from 0 to 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def best(scores: jax.Array, mask: jax.Array, keep: int, count: jax.Array) -> jax.Array:
    """The `count` highest scores of a row, best first; equal ones by their index.

    Args:
      scores: `[N]`.
      mask: bool `[N]`; others are never chosen, whatever their score.
      keep: K, static.
      count: int32 scalar, at most K and at most the tokens of the row.

    Returns:
      int32 `[K]`; N from place `count` on.
    """
    scores = scores.astype(jnp.float32)
    # A real token with a score of -inf, or NaN, still comes before what is not there.
    least = jnp.finfo(jnp.float32).min
    scores = jnp.where(jnp.isnan(scores), least, jnp.maximum(scores, least))
    order = jax.lax.top_k(jnp.where(mask, scores, -jnp.inf), keep)[1]
    return first(order, count, mask.shape[0])


def first(order: jax.Array, count: jax.Array, unused: int) -> jax.Array:
    """`order` `[..., K]` with `unused` from place `count` `[...]` on."""
    place = jnp.arange(order.shape[-1])
    return jnp.where(place < count[..., None], order, unused).astype(jnp.int32)


def chosen(order: jax.Array, num_tokens: int) -> jax.Array:
    """bool `[N]`: the tokens in `order` `[K]`; N and more stands for none."""
    return jnp.zeros(num_tokens, bool).at[order].set(True, mode="drop")


def rank(mask: jax.Array) -> jax.Array:
    """int32 `[N]`: how many True come before; -1 where False."""
    return jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, -1)


def unit(rows: jax.Array) -> jax.Array:
    """Rows over their length, float32 `[..., D]`; a row of zeros stays one."""
    rows = rows.astype(jnp.float32)
    return rows / (jnp.linalg.norm(rows, axis=-1, keepdims=True) + 1e-8)


def cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 `[..., A, B]`, of rows `a` `[..., A, D]` and `b` `[..., B, D]`."""
    return jnp.einsum("...ad,...bd->...ab", unit(a), unit(b), precision=_HIGHEST)


def min_max(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """`(s - min s) / (max s - min s + 1e-6)` over the real tokens, 0 elsewhere.

    `[..., N]` of any float dtype to float32; equal scores become zeros. Infinite ones
    become 0 and 1, and NaN 0; they have no part in min and max.
    """
    scores = scores.astype(jnp.float32)
    there = mask & jnp.isfinite(scores)
    low = jnp.min(scores, axis=-1, keepdims=True, where=there, initial=jnp.inf)
    high = jnp.max(scores, axis=-1, keepdims=True, where=there, initial=-jnp.inf)
    scaled = jnp.clip((scores - low) / (high - low + 1e-6), 0, 1)
    return jnp.where(mask & ~jnp.isnan(scaled), scaled, 0)


def masked_mean(rows: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 `[..., D]`: mean of the real rows of `[..., N, D]`; zeros if none is."""
    total = jnp.sum(rows.astype(jnp.float32), axis=-2, where=mask[..., None])
    count = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return total / jnp.maximum(count, 1)[..., None]
