"""The product as XLA compiles it: a loop over windows of rows, on any device.

Each step takes rows of one expert and multiplies them by its weight, which alone is
expanded. Experts without rows take no step. Planes of any order are read; those of one
expert are brought to the canonical order when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _dense, _implementation, _xla
from pallas_kernels._weights import Planes, WeightLayout, package_of
from pallas_kernels.ragged_matmul._visits import visits

ORDER = None
# Rows of a window: few waste no work on the rows of others, many expand a weight once.
_LEAST, _MOST = 8, 512


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
    if activation == "int8" and x.dtype != jnp.int8:
        x, x_scale = _implementation.quantize_activation(x)

    def product(rows: Any, weight: Planes, plain: WeightLayout) -> jax.Array:
        x, x_scale = rows
        return _xla.matmul(
            x,
            weight,
            plain,
            x_scale=x_scale,
            bias=None,
            activation=None,
            out_dtype=out_dtype,
        )

    y = jax.ShapeDtypeStruct((x.shape[0], layout.n), out_dtype)
    return _by_expert(product, (x, x_scale), planes, layout, group_sizes, y)


def transposed(
    g: jax.Array, planes: Planes, layout: WeightLayout, group_sizes: jax.Array
) -> jax.Array:
    """`g [T, N]` times the transposed weights, in the dtype of `g`."""

    def product(g: jax.Array, weight: Planes, plain: WeightLayout) -> jax.Array:
        w = _dense.dense(weight, plain, g.dtype)
        return lax.dot_general(g, w, (((1,), (1,)), ((), ())))

    x = jax.ShapeDtypeStruct((g.shape[0], layout.k), g.dtype)
    return _by_expert(product, g, planes, layout, group_sizes, x)


def _by_expert(
    product: Callable[[Any, Planes, WeightLayout], jax.Array],
    inputs: Any,
    planes: Planes,
    layout: WeightLayout,
    group_sizes: jax.Array,
    out: jax.ShapeDtypeStruct,
) -> jax.Array:
    """`product(rows of the inputs, weight)` for each expert, of the type `out`."""
    rows = out.shape[0]
    block = _window(rows, group_sizes.shape[0])
    table, count = visits(group_sizes, rows, block)

    def part(array: jax.Array, first: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first, block)

    def one(visit: jax.Array) -> jax.Array:
        stored = {
            name: lax.dynamic_index_in_dim(p, visit[0], keepdims=False)
            for name, p in planes.items()
        }
        weight, plain = _implementation.canonical(package_of(layout), stored, layout)
        return product(jax.tree.map(lambda a: part(a, visit[1]), inputs), weight, plain)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        visit = table[i]
        row = jnp.arange(block)[:, None]
        own = (row >= visit[2]) & (row < visit[3])
        new = jnp.where(own, one(visit), part(y, visit[1]))
        return lax.dynamic_update_slice_in_dim(y, new, visit[1], 0)

    return lax.fori_loop(0, count, step, jnp.zeros(out.shape, out.dtype))


def _window(rows: int, experts: int) -> int:
    """A power of two about twice the mean size of a group, or all rows."""
    mean = -(-rows // experts)
    return min(rows, max(_LEAST, min(_MOST, 1 << (2 * mean - 1).bit_length())))
