"""DiffTopK: a soft top K that gradients flow through."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Halvings of the interval: enough for any float32.
_STEPS = 64


@jax.jit
def soft_top_k(
    scores: jax.Array, k: jax.Array | float, mask: jax.Array | None = None
) -> jax.Array:
    """Weights from 0 to 1 that sum to k: sigmoid(w + t), with the t that makes it so.

    The gradient is exact: with v = sigmoid'(w + t) the Jacobian is
    diag(v) - v v^T / sum(v) (DiffTopK of VisionSelector, arXiv 2510.16598). The
    weights rise with the scores, so the hard top K is the same.

    Args:
      scores: float `[..., N]`.
      k: number or `[...]`, how many; brought to between 1e-4 and the real tokens less
        1e-4. No gradient flows to it.
      mask: bool `[..., N]`; other tokens get 0.

    Returns:
      `[..., N]` of the dtype of `scores`; computed in float32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> s = soft_top_k(jnp.array([0.0, 9.0, -3.0, 9.0]), 2)
      >>> [round(float(x), 3) for x in s], round(float(s.sum()), 3)
      ([0.015, 0.992, 0.001, 0.992], 2.0)
    """
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    real = jnp.sum(mask, axis=-1)
    k = jnp.clip(jnp.asarray(k, jnp.float32), 1e-4, jnp.maximum(real - 1e-4, 1e-4))
    k = jax.lax.stop_gradient(jnp.broadcast_to(k, real.shape))
    return _soft(scores.astype(jnp.float32), k, mask).astype(scores.dtype)


@jax.custom_vjp
def _soft(scores: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    return _forward(scores, k, mask)[0]


def _forward(scores: jax.Array, k: jax.Array, mask: jax.Array) -> tuple[Any, Any]:
    edge = functools.partial(jnp.max, axis=-1, where=mask, initial=-jnp.inf)
    low, high = -edge(scores) - 10, edge(-scores) + 10
    none = ~jnp.any(mask, axis=-1)
    low, high = jnp.where(none, 0, low), jnp.where(none, 0, high)

    def soft(t: jax.Array) -> jax.Array:
        return jnp.where(mask, jax.nn.sigmoid(scores + t[..., None]), 0)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> Any:
        low, high = bounds
        middle = (low + high) / 2
        few = jnp.sum(soft(middle), axis=-1) < k
        return jnp.where(few, middle, low), jnp.where(few, high, middle)

    low, high = jax.lax.fori_loop(0, _STEPS, halve, (low, high))
    weights = soft((low + high) / 2)
    return weights, weights


def _backward(weights: jax.Array, given: jax.Array) -> tuple[jax.Array, None, None]:
    slope = weights * (1 - weights)
    total = jnp.sum(slope, axis=-1, keepdims=True)
    direct = given * slope
    shared = jnp.sum(direct, axis=-1, keepdims=True) / jnp.maximum(total, 1e-30)
    return direct - shared * slope, None, None


_soft.defvjp(_forward, _backward)
