"""Errors of quantized weights, without running the model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.algorithms._blocks import to_matrix
from angeljax.formats import QTensor, Spec


def relative_error(
    w: jax.Array, q: QTensor, hessian: jax.Array | None = None
) -> jax.Array:
    """Squared error of a layer's outputs over their own square, a float32 scalar.

    tr(dW' H dW) / tr(W' H W) with H the sum of x x' over tokens: what the layer adds to
    its outputs on average. Without H, inputs count as white: ||dW||^2 / ||W||^2. Stacks
    have the sum over their entries.

    Args:
      w: the weight `[*batch, *spec.shape]`.
      q: the same, quantized.
      hessian: float32 `[*batch, K, K]`, of inputs as the weight is stored for.
    """
    return _error(w, q.dequantize(jnp.float32), hessian, q.spec)


@functools.partial(jax.jit, static_argnames="spec")
def _error(w: jax.Array, back: jax.Array, hessian: Any, spec: Spec) -> jax.Array:
    w = w.astype(jnp.float32)
    energies = []
    for x in (w - back, w):
        rows = to_matrix(x, spec)
        rows = rows.reshape(*rows.shape[:-2], -1)[..., : spec.k]
        if hessian is None:
            seen = rows
        else:
            highest = jax.lax.Precision.HIGHEST
            seen = jnp.einsum("...nk,...kj->...nj", rows, hessian, precision=highest)
        energies.append(jnp.sum(rows * seen, axis=(-2, -1)))
    noise, signal = energies
    # A weight of zeros, or one whose inputs are, has no error to speak of.
    safe = jnp.where(signal > 0, signal, 1.0)
    return jnp.sum(jnp.where(signal > 0, noise / safe, 0.0))
