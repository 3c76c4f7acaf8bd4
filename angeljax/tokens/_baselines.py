"""Choices that look at no embedding: every method should beat these."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method


@method(needs="key")
def random(tokens: Tokens) -> Choice:
    """K tokens drawn alike, without replacement.

    A strong baseline: no method beats it on every model and task (arXiv 2511.02650).
    Arguments are those of `prune`.

    Args:
      tokens: see `prune`.

    Returns:
      A `Selection`; every prefix of its order is a draw as well.

    Raises:
      ValueError: without `key`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random(jnp.ones((9, 4)), keep=3, key=jax.random.key(0)).indices.shape
      (3,)
    """
    assert tokens.key is not None
    draws = jax.random.uniform(tokens.key, tokens.mask.shape)
    return _choose.best(draws, tokens.mask, tokens.keep, tokens.count)


@method()
def uniform(tokens: Tokens) -> Choice:
    """K tokens at a constant stride: number floor(t n / K) of n, for t = 0 .. K - 1.

    Arguments are those of `prune`.

    Args:
      tokens: see `prune`.

    Returns:
      A `Selection`.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform(jnp.ones((10, 4)), keep=4).indices.tolist()
      [0, 2, 5, 7]
    """
    return strided(tokens.mask, tokens.keep, tokens.count)


def strided(mask: jax.Array, keep: int, count: jax.Array) -> jax.Array:
    """int32 `[K]`: `count` of the True places `[N]`, evenly spread, in their order."""
    real, t = jnp.sum(mask, dtype=jnp.int32), jnp.arange(keep)
    each = jnp.maximum(count, 1)
    # floor(t n / K) without a product that overflows.
    place = t * (real // each) + t * (real % each) // each
    where = jnp.argsort(~mask, stable=True)
    return _choose.first(where[jnp.minimum(place, mask.shape[0] - 1)], count, len(mask))
