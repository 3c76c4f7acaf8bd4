"""Ternary products on Hopper GPUs (H100, H200), by Pallas' Mosaic backend.

A few tokens run on the binary tensor cores (`_decode`). Float activations become 8-bit
(`activation="int8"`) or else 16-bit fixed point with one scale for each token: the
error of the latter is 2^-16 of the largest activation of the token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._weights import Planes, WeightLayout
from pallas_kernels.ternary_matmul import _decode
from pallas_kernels.ternary_matmul._order import (
    ORDER,
    TILE,
    from_hopper,
    stored_k,
    tiles,
    to_hopper,
)

__all__ = ["ORDER", "matmul", "prepare", "restore", "unsupported"]

prepare = to_hopper
restore = from_hopper


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """Why this cannot run here, or None."""
    del x, activation
    group = layout.group_size
    if layout.groups > 1 and group not in (32, 64, 128) and group % TILE:
        return f"group_size {group} is not 32, 64, 128 or a multiple of 256"
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
    **tuning: Any,
) -> jax.Array:
    """`x [M, K]` times the prepared weight."""
    if x.dtype not in (jnp.int8, jnp.float32, jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.bfloat16)
    m = x.shape[0]
    blocks, k_tiles = tiles(layout)
    x = _arranged(x, layout, k_tiles * TILE)
    if x_scale is None:
        x_scale = jnp.ones((m, 1), jnp.float32)
    c = _decode.Decode(
        format=layout.format,
        m=m,
        k_tiles=k_tiles,
        row_blocks=blocks,
        n=layout.n,
        groups=layout.groups,
        group_size=layout.group_size if layout.groups > 1 else k_tiles * TILE,
        x_dtype=x.dtype.name,
        out_dtype=jnp.dtype(out_dtype).name,
        x_bytes=1 if x.dtype == jnp.int8 or activation == "int8" else 2,
        bias=bias is not None,
        wide_scales=layout.groups > 1 and layout.scale_dtype != "bfloat16",
        **tuning,
    )
    args = [x, x_scale.reshape(m), planes["codes"]]
    if layout.format == "sherry":
        args.append(planes["high"])
    args.append(planes["scale"])
    if bias is not None:
        args.append(bias.astype(jnp.float32))
    return _decode.build(c)(*args)


def _arranged(x: jax.Array, layout: WeightLayout, k: int) -> jax.Array:
    """Activations padded to whole tiles, in the order of the groups of four."""
    if x.shape[1] != k:
        x = jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
    if layout.format == "sherry" and layout.group_stride == 16:
        runs = x.reshape(x.shape[0], -1, 4, 2, 8)
        x = runs.transpose(0, 1, 3, 4, 2).reshape(x.shape)
    return x
