"""What an implementation of a packed product is, and how one is found and called.

Each module (`reference`, `xla`, `mosaic_gpu`, `triton`, `tpu`) of an operation has

  ORDER: str | None   the plane order that it reads; None reads canonical planes
  unsupported(x, layout, activation) -> str | None
                      one clause saying why it cannot run this, None if it can; `x` has
                      a `shape` [M, K] and a `dtype`
  prepare(planes, layout) -> (planes, layout)
                      canonical to its own order; jittable, no batch axes
  restore(planes, layout) -> (planes, layout)
                      exact inverse of `prepare`
  matmul(x, planes, layout, *, x_scale, bias, activation, out_dtype) -> y
                      x [M, K], x_scale float32 [M, 1] or None, bias [N] or None; gives
                      y [M, N]. M, N, K are as they come, nothing is padded.

A module whose ORDER is None needs no `prepare` and `restore`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels._weights import CANONICAL, KernelError, Planes, WeightLayout

# Largest 16-bit activation: both bytes of it stay in int8 when split as 256 h + l.
WIDE_TOP = 127 * 256 + 127
IMPLEMENTATIONS = ("mosaic_gpu", "triton", "tpu", "xla", "reference")


@functools.cache
def implementation(package: str, name: str) -> ModuleType:
    """The module of one implementation of an operation; imported on first use.

    Raises:
      KernelError: no such implementation, or what it needs is not installed.
    """
    if name not in IMPLEMENTATIONS:
        raise KernelError(
            f"unknown implementation {name!r}: use {', '.join(IMPLEMENTATIONS)} or None"
        )
    try:
        return importlib.import_module(f"{package}.{name}")
    except ImportError as e:
        raise KernelError(
            f"implementation {name!r} is not available here ({e}): "
            "use implementation='xla' or None"
        ) from e


def reader(package: str, order: str) -> str:
    """Name of the implementation whose planes have this order."""
    if order == CANONICAL:
        return "xla"
    for name in IMPLEMENTATIONS:
        try:
            if implementation(package, name).ORDER == order:
                return name
        except KernelError:
            continue
    raise KernelError(f"no implementation here reads planes in the order {order!r}")


def canonical(
    package: str, planes: Planes, layout: WeightLayout
) -> tuple[Planes, WeightLayout]:
    """Planes in the canonical order, whatever order they are in."""
    if layout.order == CANONICAL:
        return planes, layout
    return implementation(package, reader(package, layout.order)).restore(
        planes, layout
    )


def quantize_activation(
    x: jax.Array, num_bytes: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Symmetric integers for each token, round to nearest even: `x ~ q * scale`.

    Args:
      x: float `[..., K]`.
      num_bytes: 1 for int8, 2 for int16.

    Returns:
      int8 `[..., K]` in -127..127 (int16: +-WIDE_TOP) and float32 `[..., 1]`,
      amax over the largest integer; the scale of a row of zeros is 0.
    """
    top = 127 if num_bytes == 1 else WIDE_TOP
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    inverse = jnp.where(amax > 0, float(top) / amax, 0.0)
    dtype = jnp.int8 if num_bytes == 1 else jnp.int16
    return jnp.round(x * inverse).astype(dtype), amax * jnp.float32(1 / top)


def check_call(
    x: Any,
    layout: WeightLayout,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
) -> None:
    """Refuses what no implementation takes.

    Raises:
      KernelError: shapes or dtypes that do not go together.
    """
    dtype = jnp.dtype(x.dtype)
    integer = dtype == jnp.int8
    floating = jnp.issubdtype(dtype, jnp.floating)
    if not integer and not floating:
        raise KernelError(f"x must be a float array or int8, not {dtype}")
    if not x.ndim or x.shape[-1] != layout.k:
        raise KernelError(
            f"x {list(x.shape)} does not end in the {layout.k} features that the "
            f"weight [{layout.k}, {layout.n}] takes"
        )
    if activation not in (None, "int8"):
        raise KernelError(f"activation must be None or 'int8', not {activation!r}")
    if x_scale is not None and not integer:
        raise KernelError("x_scale goes with int8 x only")
    if x_scale is not None and x_scale.size not in (1, x.size // layout.k):
        raise KernelError(
            f"x_scale {list(x_scale.shape)} has not one entry for each row of "
            f"x {list(x.shape)}"
        )
    if bias is not None and bias.shape != (layout.n,):
        raise KernelError(f"bias must have shape [{layout.n}], not {list(bias.shape)}")


def call(
    package: str,
    name: str,
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
) -> jax.Array:
    """One implementation on `x [..., K]`, differentiable in `x` and `bias`.

    `vmap` over `x` alone becomes more rows; over the planes, a loop.
    """
    rows = x.reshape(-1, layout.k)
    scale = None
    if x_scale is not None:
        scale = jnp.broadcast_to(
            x_scale.astype(jnp.float32).reshape(-1, 1), (rows.shape[0], 1)
        )
    product = _product(package, name, layout, activation, jnp.dtype(out_dtype))
    y = product(rows, dict(planes), scale, bias)
    return y.reshape(*x.shape[:-1], layout.n)


@functools.lru_cache(maxsize=4096)
def _product(
    package: str, name: str, layout: WeightLayout, activation: str | None, dtype: Any
) -> Any:
    """`(x [M, K], planes, x_scale, bias) -> [M, N]` with its rules; made once."""
    module = implementation(package, name)

    @custom_vmap
    def forward(x: Any, planes: Any, scale: Any, bias: Any) -> Any:
        return module.matmul(
            x,
            planes,
            layout,
            x_scale=scale,
            bias=bias,
            activation=activation,
            out_dtype=dtype,
        )

    @forward.def_vmap
    def _(size: int, batched: Any, x: Any, planes: Any, scale: Any, bias: Any) -> Any:
        x_b, planes_b, scale_b, bias_b = batched
        if not any(jax.tree.leaves((planes_b, bias_b))):
            if not x_b:
                x = jnp.broadcast_to(x, (size, *x.shape))
            if scale is not None and not scale_b:
                scale = jnp.broadcast_to(scale, (size, *scale.shape))
            flat = None if scale is None else scale.reshape(-1, 1)
            y = forward(x.reshape(-1, x.shape[-1]), planes, flat, bias)
            return y.reshape(size, -1, y.shape[-1]), True
        args = (x, planes, scale, bias)
        moving, fixed = [], []
        leaves, tree = jax.tree.flatten(args)
        flags = jax.tree.leaves(batched)
        for leaf, flag in zip(leaves, flags, strict=True):
            moving.append(leaf if flag else None)
            fixed.append(None if flag else leaf)

        def one(i_moving: Any) -> Any:
            picked = [
                f if m is None else m for m, f in zip(i_moving, fixed, strict=True)
            ]
            return forward(*jax.tree.unflatten(tree, picked))

        return jax.lax.map(one, moving), True

    @jax.custom_vjp
    def product(x: Any, planes: Any, scale: Any, bias: Any) -> Any:
        return forward(x, planes, scale, bias)

    def fwd(x: Any, planes: Any, scale: Any, bias: Any) -> Any:
        return forward(x, planes, scale, bias), (x, planes, scale, bias)

    def bwd(saved: Any, g: Any) -> Any:
        # Straight through the rounding of activations. The planes are constants.
        x, planes, scale, bias = saved
        zeros = jax.tree.map(_no_gradient, (planes, scale))
        d_bias = None if bias is None else jnp.sum(g, 0).astype(bias.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return _no_gradient(x), *zeros, d_bias
        from pallas_kernels import _dense

        w = _dense.dense(*canonical(package, planes, layout), dtype=g.dtype)
        dx = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())))
        return dx.astype(x.dtype), *zeros, d_bias

    product.defvjp(fwd, bwd)
    return product


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    import numpy as np

    return np.zeros(x.shape, jax.dtypes.float0)
