"""`top_logits` by XLA: the reference, and what runs without a Hopper GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def select(
    x: jax.Array, k: int, log_probs: bool, offset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Values and ids of `x [R, N]`; see `api.top_logits`."""
    values, ids = jax.lax.top_k(x, k)
    if log_probs:
        # Only these are computed: a log-softmax would write all of them.
        peak = values[:, :1]
        total = jnp.sum(jnp.exp(x - peak), axis=-1, keepdims=True)
        values = values - peak - jnp.log(total)
    return values if offset is None else values + offset[:, None], ids
