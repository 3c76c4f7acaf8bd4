"""The product as it is defined: every expert multiplies all rows and keeps its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _implementation
from pallas_kernels._weights import Planes, WeightLayout, package_of
from pallas_kernels.ternary_matmul import reference

ORDER = None


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """Nothing is."""
    del x, layout, activation
    return None


def matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    group_sizes: jax.Array,
    *,
    x_scale: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
) -> jax.Array:
    """`x [T, K]` times the weights `[E, K, N]` of the experts of its rows."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    y = jnp.zeros((x.shape[0], layout.n), out_dtype)
    for expert in range(group_sizes.shape[0]):
        weight, plain = _implementation.canonical(
            package_of(layout), {n: p[expert] for n, p in planes.items()}, layout
        )
        every = reference.matmul(
            x,
            weight,
            plain,
            x_scale=x_scale,
            bias=None,
            activation=activation,
            out_dtype=out_dtype,
        )
        own = (row >= ends[expert] - group_sizes[expert]) & (row < ends[expert])
        y = jnp.where(own, every, y)
    return y
