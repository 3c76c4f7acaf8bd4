"""Inputs of the selectors' tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def structured(
    tokens: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, batch: int = 1
) -> tuple[jnp.ndarray, ...]:
    """Queries and keys that point to topics which change along the prompt.

    Block scores lie far apart, unlike those of white noise.
    """
    rng = np.random.default_rng(tokens + dim)
    topics = rng.normal(size=(8, dim)) * 2
    shape = batch, tokens
    drift = rng.integers(0, 8, (batch, tokens // 8 + 1)).repeat(8, 1)[:, :tokens]

    def walk(heads: int) -> np.ndarray:
        noise = rng.normal(size=(*shape, heads, dim))
        level = rng.uniform(0.3, 1.7, (batch, tokens // 8 + 1, heads)).repeat(8, 1)
        x = topics[drift][:, :, None] * level[:, :tokens, :, None]
        return x + 0.7 * noise

    q, k, v = walk(heads), walk(kv_heads), walk(kv_heads)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))
