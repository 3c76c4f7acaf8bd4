"""Derivatives and batches of a ragged product, the same for all implementations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from pallas_kernels import _implementation
from pallas_kernels._weights import WeightLayout

PACKAGE = "pallas_kernels.ragged_matmul"


@functools.lru_cache(maxsize=1024)
def product(name: str, layout: WeightLayout, activation: str | None, dtype: Any) -> Any:
    """`(x [T, K], planes, group_sizes, x_scale) -> [T, N]`, differentiable in `x`.

    `vmap` becomes a loop: the rows of two batches are not sorted together.
    """
    module = _implementation.implementation(PACKAGE, name)

    @custom_vmap
    def forward(x: Any, planes: Any, group_sizes: Any, x_scale: Any) -> Any:
        return module.matmul(
            x,
            planes,
            layout,
            group_sizes,
            x_scale=x_scale,
            activation=activation,
            out_dtype=dtype,
        )

    @forward.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        del size
        leaves, tree = jax.tree.flatten(args)
        flags = jax.tree.leaves(batched)
        moving = [x for x, flag in zip(leaves, flags, strict=True) if flag]

        def one(rows: Any) -> Any:
            following = iter(rows)
            picked = [
                next(following) if flag else x
                for x, flag in zip(leaves, flags, strict=True)
            ]
            return forward(*jax.tree.unflatten(tree, picked))

        return jax.lax.map(one, moving), True

    @jax.custom_vjp
    def ragged(x: Any, planes: Any, group_sizes: Any, x_scale: Any) -> Any:
        return forward(x, planes, group_sizes, x_scale)

    def fwd(x: Any, planes: Any, group_sizes: Any, x_scale: Any) -> Any:
        saved = (x, planes, group_sizes, x_scale)
        return forward(*saved), saved

    def bwd(saved: Any, g: Any) -> Any:
        # Straight through the rounding of activations. The planes are constants.
        from pallas_kernels.ragged_matmul import xla

        x, planes, group_sizes, x_scale = saved
        others = jax.tree.map(_no_gradient, (planes, group_sizes, x_scale))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return _no_gradient(x), *others
        dx = xla.transposed(g, planes, layout, group_sizes)
        return dx.astype(x.dtype), *others

    ragged.defvjp(fwd, bwd)
    # Outside of a `jit`, one program instead of many small ones.
    return jax.jit(ragged)


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
