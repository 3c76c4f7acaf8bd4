"""Ternary products on Hopper GPUs (H100, H200), by Pallas' Mosaic backend.

One or two tokens run on the binary tensor cores (`_hopper_bits`), some on the small
products of bytes (`_hopper_bytes`), many on `wgmma`
(`_hopper_gemm`). Float activations
become 8-bit (`activation="int8"`) or else 16-bit fixed point with one scale for each
token: the error of the latter is 2^-16 of the largest activation of the token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper_bits, _hopper_bytes, _hopper_gemm, _tuning, _xla
from pallas_kernels import _hopper_tokens as tokens
from pallas_kernels._weights import Planes, WeightLayout
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
    if layout.k > 65536:
        return "K is over 65536, where int32 sums of 16-bit activations may overflow"
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
    norm: jax.Array | None = None,
    eps: float = 0.0,
    gate: str | None = None,
    residual: jax.Array | None = None,
    **tuning: Any,
) -> jax.Array:
    """`x [M, K]` times the prepared weight; `tuning` overrides the choice of a plan.

    `norm` and what follows only where `fuses` says so.
    """
    if x.dtype not in (jnp.int8, jnp.float32, jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.bfloat16)
    wide = x.dtype != jnp.int8 and activation is None
    inside = x.dtype != jnp.int8 and not wide
    plan = dict(tuning) or choose(x.shape[0], layout, wide, inside)
    kernel = plan.pop("kernel")
    if kernel == "expand":
        return _xla.matmul(
            x,
            *from_hopper(planes, layout),
            x_scale=x_scale,
            bias=bias,
            activation=activation,
            out_dtype=out_dtype,
        )
    out_dtype = jnp.dtype(out_dtype)
    if kernel in ("bits", "bytes"):
        if not _as_it_lies(layout):
            x = arranged(x, layout, tiles(layout)[1] * TILE)
        k = x.shape[1] // (2 if gate else 1)
        plan |= tokens.around(k, norm, eps, gate, residual)
        more = tokens.extra_arguments(x, norm, bias, residual, out_dtype)
        sizes = (layout, wide, x.dtype.name, out_dtype.name, bias is not None, plan)
        return _few(kernel, x, planes, x_scale, more, *sizes)
    x = arranged(x, layout, tiles(layout)[1] * TILE)
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


def choose(
    m: int, layout: WeightLayout, wide: bool, inside: bool = False
) -> dict[str, Any]:
    """The kernel for `m` tokens and its parameters: as measured, else by rule.

    `wide` activations have 16 bits; those of 8 may be quantized `inside` the product.
    """
    measured = _tuning.lookup(m, layout, wide, inside)
    if measured is not None and _possible(measured, m, layout, wide):
        return measured
    blocks, _ = tiles(layout)
    if m <= 32:
        plan = {
            "kernel": "bits" if m <= 2 and layout.format == "sherry" else "bytes",
            "warps": 8,
            "rows_per_block": -(-blocks // 264),
            "prefetch": 4,
        }
        if _possible(plan, m, layout, wide):
            return plan
    # Two bytes of activations and sums for each group cost more than a dense copy, by
    # the bytes that it moves. (Not measured.)
    dense = wide and layout.groups > 1 and m >= 1024
    if _hopper_gemm.takes(layout) and not dense:
        return {"kernel": "gemm", **_hopper_gemm.plan(m * (1 + wide), layout)}
    return {"kernel": "expand"}


def candidates(m: int, layout: WeightLayout, wide: bool) -> Iterator[dict[str, Any]]:
    """Plans worth timing, what `choose` gives by rule among them."""
    blocks, _ = tiles(layout)
    kernels = [k for k, most in (("bits", 2), ("bytes", 32)) if m <= most]
    for kernel, sizes in itertools.product(kernels, _tuning.blocks_and_warps(blocks)):
        plan = {"kernel": kernel, **sizes}
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
) -> _hopper_bits.Decode:
    blocks, k_tiles = tiles(layout)
    return _hopper_bits.Decode(
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
        **{"valid_k": TILE * k_tiles, **plan},
    )


def bytes_of(
    m: int,
    layout: WeightLayout,
    wide: bool,
    x_dtype: str,
    out_dtype: str,
    bias: bool,
    plan: dict[str, Any],
) -> _hopper_bytes.Decode:
    blocks, k_tiles = tiles(layout)
    return _hopper_bytes.Decode(
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
        **{"valid_k": TILE * k_tiles, **plan},
    )


def _weights(planes: Planes, layout: WeightLayout) -> list[jax.Array]:
    names = ("codes", "high") if layout.format == "sherry" else ("codes",)
    return [planes[name] for name in names]


def fuses(m: int, layout: WeightLayout, wide: bool) -> bool:
    """Whether a norm, a gate and a residual can be part of a product of float `x`."""
    few = choose(m, layout, wide, not wide)["kernel"] in ("bits", "bytes")
    return few and _as_it_lies(layout)


def _as_it_lies(layout: WeightLayout) -> bool:
    """Whether the kernels for a few tokens read `x` without a copy of it."""
    return layout.k % 16 == 0 and layout.group_stride == 1


def _few(
    kernel: str,
    x: jax.Array,
    planes: Planes,
    x_scale: jax.Array | None,
    more: list[jax.Array],
    layout: WeightLayout,
    *sizes: Any,
) -> jax.Array:
    m = x.shape[0]
    if x_scale is None:
        x_scale = jnp.ones((m, 1), jnp.float32)
    args = [x, x_scale.reshape(m), *_weights(planes, layout), planes["scale"], *more]
    if kernel == "bits":
        return _hopper_bits.build(bits_of(m, layout, *sizes))(*args)
    return _hopper_bytes.build(bytes_of(m, layout, *sizes))(*args)


def arranged(x: jax.Array, layout: WeightLayout, k: int) -> jax.Array:
    """Activations padded to whole tiles, in the order of the groups of four."""
    if x.shape[1] != k:
        x = jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
    if layout.format == "sherry" and layout.group_stride == 16:
        runs = x.reshape(x.shape[0], -1, 4, 2, 8)
        x = runs.transpose(0, 1, 3, 4, 2).reshape(x.shape)
    return x
