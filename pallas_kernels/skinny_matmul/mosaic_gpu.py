"""`skinny_matmul` as one launch of `_warps`, for Hopper and bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _ptx as asm
from pallas_kernels._hopper_lanes import kernel
from pallas_kernels.skinny_matmul._blocks import Blocks, blocks
from pallas_kernels.skinny_matmul._warps import TURN, Case, emit


def refused(k: int, n: int, dtype: Any, transposed: bool) -> str | None:
    """One clause if a weight cannot be multiplied here."""
    if dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {dtype}"
    if not transposed:
        return "it takes weights that are stored [N, K] (transposed=True)"
    if k % TURN or n % 2:
        return f"it takes multiples of {TURN} inputs and of 2 outputs, not {k} and {n}"
    return None


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
    tiles: Blocks | None = None,
) -> jax.Array:
    """`[M, n]` of `x [M, K]`; see `api.skinny_matmul`."""
    assert transposed
    m, k = x.shape
    parts = 1 if second is None else 2
    size = tiles or blocks(k * parts, n)
    case = Case(
        *(m, k, n, norm is not None, swiglu, bias is not None, residual is not None),
        *(out_dtype == jnp.float32, eps, size.warps, size.tiles, parts),
    )
    given = [a for a in (second, w, norm, bias, residual) if a is not None]
    return _build(case)(x, *given)


@functools.cache
def _build(c: Case) -> Callable[..., jax.Array]:
    out = jnp.float32 if c.float_out else jnp.bfloat16
    product = kernel(
        functools.partial(emit, asm, c),
        (jax.ShapeDtypeStruct((c.m, c.n), out),),
        grid=c.grid,
        warps=c.warps,
        words=c.smem_words,
        name="skinny_matmul",
    )
    return lambda *args: product(*args)[0]
