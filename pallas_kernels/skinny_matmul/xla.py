"""`skinny_matmul` written out for XLA: the reference, and what runs without a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.skinny_matmul._blocks import ROWS


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    second: jax.Array | None,
    n: int,
    transposed: bool,
    norm: jax.Array | None,
    eps: float,
    swiglu: bool,
    bias: jax.Array | None,
    residual: jax.Array | None,
    out_dtype: Any,
) -> jax.Array:
    """`[M, n]` of `x [M, K]`; see `api.skinny_matmul`."""
    m = x.shape[0]
    # Products of one size, as another number of rows may be summed in another order.
    more = ((0, -m % ROWS), (0, 0))
    each = [x] if second is None else [x, second]
    tiles = [jnp.pad(x, more).reshape(-1, ROWS, x.shape[1]) for x in each]
    y = jax.lax.map(lambda t: _tile(t, w, transposed, norm, eps, bias), tiles)
    y = y.reshape(-1, y.shape[-1])
    if swiglu:
        y = jax.nn.silu(y[:, :n]) * y[:, n:]
    if residual is not None:
        y = y + jnp.pad(residual, more).astype(jnp.float32)
    return y[:m].astype(out_dtype)


def _tile(
    each: list[jax.Array],
    w: jax.Array,
    transposed: bool,
    norm: Any,
    eps: float,
    bias: Any,
) -> jax.Array:
    count, axis = each[0].shape[1], 1 if transposed else 0
    y: Any = 0.0
    for i, x in enumerate(each):
        part = slice(i * count, (i + 1) * count)
        wide, factor = x.astype(jnp.float32), None
        if norm is not None:
            factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + eps)
            x = (wide * norm[part].astype(jnp.float32)).astype(x.dtype)
        product = jax.lax.dot_general(
            x,
            w[:, part] if transposed else w[part],
            (((1,), (axis,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        y = y + (product if factor is None else product * factor)
    return y if bias is None else y + bias.astype(jnp.float32)
