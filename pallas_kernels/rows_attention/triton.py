"""`rows_attention` as one launch, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.rows_attention._blocks import Blocks, blocks, queries_of
from pallas_kernels.rows_attention._kernel import Case, kernel


def attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    held: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    *,
    eps: float,
    tiles: Blocks | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(y, k, v)`; see `api.rows_attention`. The mask is int8 `[B, T, S]`."""
    batch, tokens, columns = qkv.shape
    _, kv_heads, size, features = k.shape
    heads = columns // features - 2 * kv_heads
    queries = queries_of(heads, kv_heads)
    if tiles is None:
        tiles = blocks(features, queries, k.dtype.itemsize)
    case = Case(
        *(tokens, heads, kv_heads, features, size, queries),
        held=held[0].shape[2] if held else 0,
        norms=bool(norms),
        eps=eps,
        blocks=tiles,
        barrier=not interpret,
    )
    return pl.pallas_call(
        functools.partial(kernel, case),
        out_shape=(
            jax.ShapeDtypeStruct((batch, tokens, heads * features), qkv.dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        grid=(batch, kv_heads),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=plt.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
        name="rows_attention",
    )(qkv, cos, sin, mask, slots, k, v, *held, *norms)
