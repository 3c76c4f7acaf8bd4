"""`top_logits` by XLA: the reference, and what runs without a Hopper GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def select(
    x: jax.Array, k: int, total: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Values, ids and sums of `x [R, N]`; see `api.top_logits`."""
    values, ids = jax.lax.top_k(x, k)
    if not total:
        return values, ids, None
    peak = values[:, :1]
    return values, ids, jnp.sum(jnp.exp(x - peak), axis=-1)
