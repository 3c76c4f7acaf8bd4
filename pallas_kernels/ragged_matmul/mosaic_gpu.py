"""Ragged products on Hopper GPUs (H100, H200), by Pallas' Mosaic backend.

Few rows for each expert: the decode kernels of the format, which quantize activations
by themselves (`_decode`). Many: the product with weights in registers (`_gemm`). What
has neither is multiplied by XLA, one expert at a time. Activations are treated as in
`ternary_matmul` and `quantized_matmul`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper_gemm, _implementation
from pallas_kernels._weights import TERNARY, Planes, WeightLayout, package_of
from pallas_kernels.quantized_matmul import mosaic_gpu as quantized
from pallas_kernels.ragged_matmul import _decode, _gemm, xla
from pallas_kernels.ternary_matmul import mosaic_gpu as ternary

ORDER = "hopper"
_DECODE_ROWS = 16  # the most rows of one visit
_ORDER_OF_PLANES = ("codes", "high", "scale", "zero", "scale2")


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """Why this cannot run here, or None."""
    module = _implementation.implementation(package_of(layout), "mosaic_gpu")
    return module.unsupported(x, layout, activation)


def matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    group_sizes: jax.Array,
    *,
    x_scale: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    **tuning: Any,
) -> jax.Array:
    """`x [T, K]` times the prepared weights; `tuning` overrides the chosen plan."""
    if x.dtype not in (jnp.int8, jnp.float32, jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.bfloat16)
    wide = x.dtype != jnp.int8 and activation is None
    out_dtype = jnp.dtype(out_dtype)
    rows, experts = x.shape[0], group_sizes.shape[0]
    plan = dict(tuning) or choose(rows, experts, layout, wide)
    if plan["kernel"] == "expand":
        return xla.matmul(
            x,
            planes,
            layout,
            group_sizes,
            x_scale=x_scale,
            activation=activation,
            out_dtype=out_dtype,
        )
    held = [planes[name] for name in _ORDER_OF_PLANES if name in planes]
    x = _arranged(x, layout)
    if plan["kernel"] == "gemm":
        del plan["kernel"]
        return _gemm.product(
            x, x_scale, held, layout, group_sizes, wide, out_dtype, **plan
        )
    c = _decode_of(plan, layout, wide, x.dtype.name, out_dtype.name)
    return _decode.product(c, x, x_scale, held, group_sizes)


def choose(rows: int, experts: int, layout: WeightLayout, wide: bool) -> dict[str, Any]:
    """The kernel for `rows` rows of all experts together, and its parameters."""
    mean = -(-rows // experts)
    gemm = _hopper_gemm.takes(layout)
    if mean <= _DECODE_ROWS // 2 or not gemm:
        most = min(_DECODE_ROWS, _power_above(2 * rows / experts), rows)
        for m in (most, *(2**i for i in (3, 2, 1, 0) if 2**i < most)):
            plan = _decode_plan(m, min(rows, experts), layout)
            if mean <= 2 * m and _decode_of(plan, layout, wide).fits:
                return plan
    if gemm:
        tokens = _hopper_gemm.plan(mean * (1 + wide), layout)
        return {"kernel": "gemm", **tokens}
    return {"kernel": "expand"}


def _decode_plan(m: int, busy: int, layout: WeightLayout) -> dict[str, Any]:
    """For visits of `m` rows, of which `busy` are at work."""
    # Blocks of all visits together fill the GPU: each may take more outputs.
    rows = busy * -(-layout.n // 128) * 8 // 264
    return {
        "kernel": "bits" if layout.format in TERNARY and m <= 2 else "bytes",
        "m": m,
        "warps": 8,
        "rows_per_block": max(1, min(4 if m == 1 else 8, rows)),
        "prefetch": 4,
    }


def _power_above(x: float) -> int:
    return 1 << (max(1, math.ceil(x)) - 1).bit_length()


def _decode_of(
    plan: dict[str, Any],
    layout: WeightLayout,
    wide: bool,
    x_dtype: str = "float32",
    out_dtype: str = "float32",
) -> _decode.Decode:
    sizes = {key: v for key, v in plan.items() if key not in ("kernel", "m")}
    make: Any = quantized.decode_of
    if layout.format in TERNARY:
        make = ternary.bits_of if plan["kernel"] == "bits" else ternary.bytes_of
    return make(plan["m"], layout, wide, x_dtype, out_dtype, False, sizes)


def _arranged(x: jax.Array, layout: WeightLayout) -> jax.Array:
    """Activations padded to whole tiles, in the order that the kernels read."""
    if layout.format in TERNARY:
        return ternary.arranged(x, layout, 256 * ternary.tiles(layout)[1])
    k = 128 * quantized.tiles(layout)[1]
    return jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
