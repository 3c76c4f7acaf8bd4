"""Packed weights of experts times many rows: `_hopper_gemm` by windows of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper_gemm
from pallas_kernels._hopper_ragged import ALIGN
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._weights import WeightLayout
from pallas_kernels.ragged_matmul._visits import visit_bound, visits


def product(
    x: jax.Array,
    x_scale: jax.Array | None,
    planes: Sequence[jax.Array],
    layout: WeightLayout,
    group_sizes: jax.Array,
    wide: bool,
    out_dtype: Any,
    **tiling: Any,
) -> jax.Array:
    """`x [T, K']` times the weights of experts in the order `hopper`.

    Args:
      x: int8 or float, padded to whole tiles along K.
      x_scale: of int8 `x`, float32 `[T, 1]`.
      planes: in the order of the kernel's arguments, `[E, ...]`.
      layout: of the planes.
      group_sizes: int32 `[E]`.
      wide: 16-bit activations; both bytes of a token are neighbouring rows.
      out_dtype: of the result.
      **tiling: fields of `Gemm`.

    Returns:
      `[T, N]`.
    """
    if x.dtype != jnp.int8:
        x, x_scale = quantize_activation(x, 2 if wide else 1)
    if x_scale is None:
        x_scale = jnp.ones((x.shape[0], 1), jnp.float32)
    if wide:
        high = (x.astype(jnp.int32) + 128) >> 8
        low = x.astype(jnp.int32) - (high << 8)
        x = jnp.stack([high, low], 1).astype(jnp.int8).reshape(-1, x.shape[1])
        x_scale = jnp.concatenate([x_scale * 256, x_scale], 1)
        group_sizes = 2 * group_sizes
    rows, experts = x.shape[0], group_sizes.shape[0]
    inner = jnp.dtype(jnp.float32) if wide else jnp.dtype(out_dtype)
    c = _hopper_gemm.Gemm(
        format=layout.format,
        m=rows + -rows % ALIGN,
        n=-(-layout.n // 64) * 64,
        k_tiles=x.shape[1] // 256,
        groups=layout.groups,
        group_size=layout.group_size,
        out_dtype=inner.name,
        wide_scales=layout.groups > 1 and layout.scale_dtype != "bfloat16",
        experts=experts,
        visits=visit_bound(rows, experts, tiling["tokens"], ALIGN),
        **tiling,
    )
    table, _ = visits(group_sizes, rows, c.tokens, ALIGN)
    x = jnp.pad(x, ((0, c.m - rows), (0, 0)))
    # The scales of a window are read whole.
    scales = jnp.pad(x_scale.reshape(-1), (0, c.tokens))
    *weights, scale = planes
    if layout.groups == 1:
        scale = scale.reshape(-1)
    y = _hopper_gemm.build(c)(table, x, scales, *weights, scale)
    y = y[:rows, : layout.n]
    if wide:
        y = y[0::2] + y[1::2]
    return y.astype(out_dtype)
