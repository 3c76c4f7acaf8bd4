"""Cosine similarities of all pairs of tokens, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._devices import is_gpu

_EPS = 1e-8  # added to a norm, as AngelSlim does
_PAIRS = (((2,), (2,)), ((0,), (0,)))


def inverse_norms(embeds: jax.Array) -> jax.Array:
    """float32 `[B, N, 1]`, `1 / (|x| + 1e-8)`; 0 where a row is zero or not finite."""
    x = embeds.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return jnp.where((norm > 0) & jnp.isfinite(norm), 1 / (norm + _EPS), 0.0)


def unit_rows(embeds: jax.Array) -> jax.Array:
    """Rows over their norms, float32 `[B, N, D]`; zeros where that is no number."""
    scale = inverse_norms(embeds)
    return jnp.where(scale > 0, embeds.astype(jnp.float32) * scale, 0.0)


def cosine(embeds: jax.Array, precision: str) -> jax.Array:
    """Signed cosines float32 `[B, N, N]`.

    Products of 16-bit embeddings are exact in float32, so their rows are multiplied as
    they are, on tensor cores, and scaled afterwards. On GPUs rows of float32 are split
    into two bfloat16 terms each, of which three products count: what is left out is
    2**-18 of a product, and over a row of D of them about 2**-18 / sqrt(D).

    Args:
      embeds: float `[B, N, D]`.
      precision: "highest", or "fast", one bfloat16 product of unit rows.
    """
    if precision == "fast":
        rows = unit_rows(embeds).astype(jnp.bfloat16)
        return _product(rows, rows)
    if embeds.dtype in (jnp.bfloat16, jnp.float16):
        scale = inverse_norms(embeds)
        both = scale * scale.transpose(0, 2, 1)
        return jnp.where(both > 0, _product(embeds, embeds) * both, 0.0)
    rows = unit_rows(embeds)
    if not is_gpu():
        return lax.dot_general(rows, rows, _PAIRS, precision=lax.Precision.HIGHEST)
    # reduce_precision, as XLA may drop a conversion to bfloat16 and back.
    high = lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
    low = (rows - high).astype(jnp.bfloat16)
    high = high.astype(jnp.bfloat16)
    return _product(
        jnp.concatenate([high, high, low], axis=-1),
        jnp.concatenate([high, low, high], axis=-1),
    )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of 16-bit numbers, summed in float32."""
    return lax.dot_general(a, b, _PAIRS, preferred_element_type=jnp.float32)
