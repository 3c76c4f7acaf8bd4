"""Products with 8- and 4-bit weights on Hopper GPUs, by Pallas' Mosaic backend.

A few tokens: `_hopper_bytes`. Many: `_hopper_gemm` for integers with scales for 128
weights or more. Float activations become int8 (`activation="int8"`), else 16-bit fixed
point with one scale for each token (error 2^-16 of its largest activation), and beside
FP8 weights two e4m3 values (error 2^-8 of each activation, 2^-19 of the largest).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper_bytes, _hopper_gemm, _tuning, _xla
from pallas_kernels import _hopper_tokens as tokens
from pallas_kernels._hopper_operands import FLOATS
from pallas_kernels._weights import Planes, WeightLayout
from pallas_kernels.quantized_matmul._order import (
    ORDER,
    from_hopper,
    grouped,
    tiles,
    to_hopper,
)

__all__ = ["ORDER", "candidates", "matmul", "prepare", "restore", "unsupported"]

prepare = to_hopper
restore = from_hopper


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """Why this cannot run here, or None."""
    if layout.format == "nf4":
        return "nf4 has no kernel for this GPU"
    if layout.k > 131072:
        return "K is over 131072, where int32 sums may overflow"
    group = layout.group_size
    if layout.groups > 1 and group not in (16, 32, 64) and group % 128:
        return f"group_size {group} is not 16, 32, 64 or a multiple of 128"
    if x is None or layout.format not in FLOATS:
        return None
    if x.dtype == jnp.int8 or activation is not None:
        return "FP8 weights take float activations"
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
    out_dtype = jnp.dtype(out_dtype)
    inside = x.dtype != jnp.int8 and not wide
    plan = dict(tuning) or choose(x.shape[0], layout, wide, inside)
    kernel = plan.pop("kernel")
    if kernel == "bytes":
        k = tiles(layout)[1] * 128
        if layout.k % 16 == 0:
            k = layout.k
        elif x.shape[1] != k:
            x = jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
        plan |= tokens.around(k, norm, eps, gate, residual)
        more = tokens.extra_arguments(x, norm, bias, residual, out_dtype)
        sizes = (layout, wide, x.dtype.name, out_dtype.name, bias is not None, plan)
        return _few(x, planes, x_scale, more, *sizes)
    if kernel == "gemm":
        return _hopper_gemm.product(
            x,
            x_scale,
            planes,
            layout,
            bias=bias,
            wide=wide,
            out_dtype=out_dtype,
            k_tiles=tiles(layout)[1] // 2,
            **plan,
        )
    return _xla.matmul(
        x,
        *from_hopper(planes, layout),
        x_scale=x_scale,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
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
    if m <= 16:
        plan = {
            "kernel": "bytes",
            "warps": 8,
            "rows_per_block": -(-tiles(layout)[0] // 264),
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
    if m <= 32:
        for sizes in _tuning.blocks_and_warps(blocks):
            plan = {"kernel": "bytes", **sizes}
            if _possible(plan, m, layout, wide):
                yield plan
    if m >= 8 and _hopper_gemm.takes(layout):
        yield from _hopper_gemm.candidates(m * (1 + wide), layout)
    if m >= 8:
        yield {"kernel": "expand"}


def _possible(plan: dict[str, Any], m: int, layout: WeightLayout, wide: bool) -> bool:
    if plan["kernel"] != "bytes":
        return plan["kernel"] == "expand" or _hopper_gemm.takes(layout)
    sizes = {key: value for key, value in plan.items() if key != "kernel"}
    return decode_of(m, layout, wide, "float32", "float32", False, sizes).fits


def decode_of(
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
        k_tiles=k_tiles,
        row_blocks=blocks,
        n=layout.n,
        grouped=grouped(layout),
        groups=layout.groups,
        group_size=layout.group_size if layout.groups > 1 else k_tiles * 128,
        asymmetric=not layout.symmetric,
        wide_scales=layout.scale_dtype in ("float32", "float16"),
        channel_scale=layout.format == "nvfp4",
        x_dtype=x_dtype,
        out_dtype=out_dtype,
        pieces=2 if wide else 1,
        bias=bias,
        **{"valid_k": 128 * k_tiles, **plan},
    )


def fuses(m: int, layout: WeightLayout, wide: bool) -> bool:
    """Whether a norm, a gate and a residual can be part of a product of float `x`."""
    return choose(m, layout, wide, not wide)["kernel"] == "bytes" and layout.k % 16 == 0


def _few(
    x: jax.Array,
    planes: Planes,
    x_scale: jax.Array | None,
    more: list[jax.Array],
    *sizes: Any,
) -> jax.Array:
    m = x.shape[0]
    if x_scale is None:
        x_scale = jnp.ones((m, 1), jnp.float32)
    args = [x, x_scale.reshape(m), planes["codes"], planes["scale"]]
    args += [planes[name] for name in ("zero", "scale2") if name in planes]
    return _hopper_bytes.build(decode_of(m, *sizes))(*args, *more)
