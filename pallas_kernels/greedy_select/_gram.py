"""Cosine similarities of all pairs of tokens, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._devices import is_gpu

_EPS = 1e-8  # added to a norm, as AngelSlim does
_SCALE = 4096.0  # of unit rows in float16, whose largest number is 65504
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
    they are, on tensor cores, and scaled afterwards. On GPUs unit rows of float32 are
    split into two terms of float16, x = h + l up to 2**-24 of x, and their products
    h h, h l and l h are added; l l is below 2**-24. As l h is the transpose of h l,
    that is two products on tensor cores, as good as one in float32.

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
    # The scale keeps small terms normal. XLA may drop a conversion to float16 and back,
    # but no reduce_precision.
    rows = rows * _SCALE
    high = lax.reduce_precision(rows, exponent_bits=5, mantissa_bits=10)
    low = (rows - high).astype(jnp.float16)
    high = high.astype(jnp.float16)
    mixed = _product(high, low)
    total = _product(high, high) + (mixed + mixed.transpose(0, 2, 1))
    return total * (1 / _SCALE**2)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of 16-bit numbers, summed in float32."""
    return lax.dot_general(a, b, _PAIRS, preferred_element_type=jnp.float32)


def padding(n: int) -> int:
    """Rows to add to n, so that rows of the matrix start where GPUs like them to."""
    return -n % 8 if is_gpu() else 0
