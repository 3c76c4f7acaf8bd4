"""`skinny_matmul` as one launch, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.skinny_matmul._blocks import ROWS, Blocks, blocks
from pallas_kernels.skinny_matmul._kernel import Case, kernel


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    n: int,
    transposed: bool,
    norm: jax.Array | None,
    eps: float,
    swiglu: bool,
    bias: jax.Array | None,
    residual: jax.Array | None,
    out_dtype: Any,
    tiles: Blocks | None,
    interpret: bool = False,
) -> jax.Array:
    """`[M, n]` of `x [M, K]`; see `api.skinny_matmul`."""
    m, k = x.shape
    tiles = tiles or blocks(n, w.dtype.itemsize, transposed)
    given = [a for a in (norm, bias, residual) if a is not None]
    case = Case(
        *(m, k, n, tiles, transposed, norm is not None, swiglu),
        *(bias is not None, residual is not None, eps),
    )
    return pl.pallas_call(
        functools.partial(kernel, case),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(pl.cdiv(n, tiles.n), pl.cdiv(m, ROWS)),
        compiler_params=plt.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
        name="skinny_matmul",
    )(x, w, *given)
