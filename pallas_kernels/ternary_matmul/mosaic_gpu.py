"""Ternary products on Hopper GPUs (H100, H200), by Pallas' Mosaic backend.

One or two tokens run on the binary tensor cores (`_decode`, the kernel "bits"), some on
the small products of bytes ("bytes"), many on `wgmma` ("gemm"). Float activations
become 8-bit (`activation="int8"`) or else 16-bit fixed point with one scale for each
token: the error of the latter is 2^-16 of the largest activation of the token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper_gemm, _tuning
from pallas_kernels._weights import Planes, WeightLayout
from pallas_kernels.quantized_matmul import _decode as _bytes
from pallas_kernels.ternary_matmul import _decode
from pallas_kernels.ternary_matmul._order import (
    ORDER,
    TILE,
    from_hopper,
    tiles,
    to_hopper,
)

__all__ = ["ORDER", "candidates", "matmul", "prepare", "restore", "unsupported"]

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
    """`x [M, K]` times the prepared weight; `tuning` overrides the choice of a plan."""
    if x.dtype not in (jnp.int8, jnp.float32, jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.bfloat16)
    wide = x.dtype != jnp.int8 and activation is None
    plan = dict(tuning) or choose(x.shape[0], layout, wide)
    kernel = plan.pop("kernel")
    if kernel == "expand":
        return _expanded(x, planes, layout, x_scale, bias, activation, out_dtype)
    x = arranged(x, layout, tiles(layout)[1] * TILE)
    out_dtype = jnp.dtype(out_dtype)
    if kernel in ("bits", "bytes"):
        return _few(kernel, x, planes, layout, x_scale, bias, wide, out_dtype, plan)
    return _hopper_gemm.product(
        x,
        x_scale,
        planes,
        layout,
        bias=bias,
        wide=wide,
        out_dtype=out_dtype,
        k_tiles=tiles(layout)[1],
        **plan,
    )


def choose(m: int, layout: WeightLayout, wide: bool) -> dict[str, Any]:
    """The kernel for `m` tokens and its parameters: as measured, else by rule."""
    measured = _tuning.lookup(m, layout, wide)
    if measured is not None and _possible(measured, m, layout, wide):
        return measured
    blocks, _ = tiles(layout)
    if m <= 32:
        plan = {
            "kernel": "bits" if m <= 2 else "bytes",
            "warps": 8,
            "rows_per_block": -(-blocks // 264),
            "prefetch": 4,
        }
        if _possible(plan, m, layout, wide):
            return plan
    if _hopper_gemm.takes(layout):
        return {"kernel": "gemm", **_hopper_gemm.plan(m * (1 + wide), layout)}
    return {"kernel": "expand"}


def candidates(m: int, layout: WeightLayout, wide: bool) -> Iterator[dict[str, Any]]:
    """Plans worth timing, what `choose` gives by rule among them."""
    blocks, _ = tiles(layout)
    kernels = [k for k, most in (("bits", 4), ("bytes", 32)) if m <= most]
    rows = _tuning.rows_per_block(blocks)
    for each in itertools.product(kernels, (4, 8, 16), rows, (2, 4)):
        keys = ("kernel", "warps", "rows_per_block", "prefetch")
        plan = dict(zip(keys, each, strict=True))
        if _possible(plan, m, layout, wide):
            yield plan
    if m >= 8 and _hopper_gemm.takes(layout):
        yield from _hopper_gemm.candidates(m * (1 + wide), layout)
    if m >= 64:
        yield {"kernel": "expand"}


def _possible(plan: dict[str, Any], m: int, layout: WeightLayout, wide: bool) -> bool:
    kernel = plan["kernel"]
    if kernel not in ("bits", "bytes"):
        return kernel == "expand" or _hopper_gemm.takes(layout)
    sizes = {key: value for key, value in plan.items() if key != "kernel"}
    make = bits_of if kernel == "bits" else bytes_of
    return make(m, layout, wide, "float32", "float32", False, sizes).fits


def bits_of(
    m: int,
    layout: WeightLayout,
    wide: bool,
    x_dtype: str,
    out_dtype: str,
    bias: bool,
    plan: dict[str, Any],
) -> _decode.Decode:
    blocks, k_tiles = tiles(layout)
    return _decode.Decode(
        format=layout.format,
        m=m,
        k_tiles=k_tiles,
        row_blocks=blocks,
        n=layout.n,
        groups=layout.groups,
        group_size=layout.group_size if layout.groups > 1 else k_tiles * TILE,
        x_dtype=x_dtype,
        out_dtype=out_dtype,
        x_bytes=2 if wide else 1,
        bias=bias,
        wide_scales=layout.groups > 1 and layout.scale_dtype != "bfloat16",
        **plan,
    )


def bytes_of(
    m: int,
    layout: WeightLayout,
    wide: bool,
    x_dtype: str,
    out_dtype: str,
    bias: bool,
    plan: dict[str, Any],
) -> _bytes.Decode:
    blocks, k_tiles = tiles(layout)
    return _bytes.Decode(
        format=layout.format,
        m=m,
        k_tiles=2 * k_tiles,
        row_blocks=blocks,
        n=layout.n,
        grouped=layout.groups > 1,
        groups=layout.groups,
        group_size=layout.group_size if layout.groups > 1 else k_tiles * TILE,
        asymmetric=False,
        wide_scales=layout.groups > 1 and layout.scale_dtype != "bfloat16",
        channel_scale=False,
        x_dtype=x_dtype,
        out_dtype=out_dtype,
        pieces=2 if wide else 1,
        bias=bias,
        **plan,
    )


def _weights(planes: Planes, layout: WeightLayout) -> list[jax.Array]:
    names = ("codes", "high") if layout.format == "sherry" else ("codes",)
    return [planes[name] for name in names]


def _few(
    kernel: str,
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    wide: bool,
    out_dtype: Any,
    plan: dict[str, Any],
) -> jax.Array:
    m = x.shape[0]
    if x_scale is None:
        x_scale = jnp.ones((m, 1), jnp.float32)
    args = [x, x_scale.reshape(m), *_weights(planes, layout), planes["scale"]]
    if bias is not None:
        args.append(bias.astype(jnp.float32))
    sizes = (m, layout, wide, x.dtype.name, out_dtype.name, bias is not None, plan)
    if kernel == "bits":
        return _decode.build(bits_of(*sizes))(*args)
    return _bytes.build(bytes_of(*sizes))(*args)


def _expanded(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
) -> jax.Array:
    """One dense copy of the weight and a product by XLA."""
    from pallas_kernels.ternary_matmul import xla

    canonical, plain = from_hopper(planes, layout)
    return xla.matmul(
        x,
        canonical,
        plain,
        x_scale=x_scale,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
    )


def arranged(x: jax.Array, layout: WeightLayout, k: int) -> jax.Array:
    """Activations padded to whole tiles, in the order of the groups of four."""
    if x.shape[1] != k:
        x = jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
    if layout.format == "sherry" and layout.group_stride == 16:
        runs = x.reshape(x.shape[0], -1, 4, 2, 8)
        x = runs.transpose(0, 1, 3, 4, 2).reshape(x.shape)
    return x
