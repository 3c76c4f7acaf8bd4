"""The product as it is defined, without a thought of speed.

Integer activations: an exact int32 product for every scale group, then scales in
float32. Float activations: a float32 product at highest precision.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dense
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._weights import Planes, WeightLayout, scales

ORDER = None


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """Nothing is."""
    del x, layout, activation
    return None


def matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
) -> jax.Array:
    """`x [M, K]` times the weight `[K, N]`."""
    if activation == "int8" and x.dtype != jnp.int8:
        x, x_scale = quantize_activation(x)
    q = _dense.codes(planes, layout)
    if x.dtype == jnp.int8 and jnp.issubdtype(q.dtype, jnp.integer):
        y = _integer(x, q, scales(planes, layout), layout)
    else:
        w = _dense.dense(planes, layout)
        highest = jax.lax.Precision.HIGHEST
        y = jnp.dot(x.astype(jnp.float32), w, precision=highest)
    if x_scale is not None:
        y = y * x_scale
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def _integer(
    x: jax.Array, q: jax.Array, scale: jax.Array, layout: WeightLayout
) -> jax.Array:
    pad = layout.groups * layout.group_size - layout.k
    if layout.groups == 1:
        return jnp.dot(x, q, preferred_element_type=jnp.int32) * scale
    x = jnp.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], layout.groups, -1)
    q = jnp.pad(q, ((0, pad), (0, 0))).reshape(layout.groups, -1, layout.n)
    parts = jnp.einsum("mgk,gkn->mgn", x, q, preferred_element_type=jnp.int32)
    return jnp.einsum(
        "mgn,gn->mn",
        parts.astype(jnp.float32),
        scale,
        precision=jax.lax.Precision.HIGHEST,
    )
