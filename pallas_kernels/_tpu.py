"""What the TPU implementations share: the Pallas kernel of packed products.

The grid goes over blocks of M, N and, innermost, K; a block of packed weights is
decoded in VMEM and multiplied in the narrowest dtype that is exact: int8 or, from the
seventh generation on, whose matrix unit has no fast int8, e4m3 for ternary and int4
weights beside the two halves of each int8 activation. Other activations are multiplied
in bfloat16, float32 ones in float32. Scales of groups multiply partial sums, or the
weights where that loses nothing or is much less work.

On anything but a TPU the same kernel runs in Pallas' interpret mode.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_decode as decode
from pallas_kernels._devices import current_device
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._tpu_order import (
    MICROSCALING,
    ORDER,
    TILE,
    group_run,
    padded_n,
    prepare,
    restore,
    scale_run,
    tiles,
)
from pallas_kernels._weights import Planes, WeightLayout

__all__ = ["ORDER", "matmul", "prepare", "restore", "unsupported"]

_INTEGER = ("t2", "sherry", "int4", "int8")
_E4M3 = jnp.dtype(jnp.float8_e4m3fn)
_INT8, _BF16 = jnp.dtype(jnp.int8), jnp.dtype(jnp.bfloat16)
_F32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One product: dtypes and block sizes. All static.

    Attributes:
      operand: dtype that is multiplied.
      halves: whether a block of `x` is the high halves above the low ones.
      scaled: whether weights are scaled before the product, not sums after it.
      run: weights along K of one product.
      m, n, k: sizes of a block.
    """

    operand: Any
    halves: bool
    scaled: bool
    run: int
    m: int
    n: int
    k: int


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """One clause if this product is left out; see `_implementation`."""
    del activation
    least = 32 if layout.format in _INTEGER else 16
    if layout.format == "sherry" and layout.group_stride == 16:
        least = 64
    if layout.groups > 1 and group_run(layout) < least:
        return (
            f"scale groups of {layout.group_size} weights are no multiple of {least}, "
            f"as {layout.format} needs here"
        )
    if layout.k > 131072:
        return "K is over 131072, where int32 sums may overflow"
    if x is not None and not (x.shape[0] and layout.n and layout.k):
        return "an empty product"
    return None


def generation() -> int:
    """Generation of the current TPU; of a device that is none, the sixth."""
    found = re.search(r"TPU\D*(\d+)", current_device().device_kind)
    return int(found[1]) if found else 6


def plan(m: int, dtype: Any, layout: WeightLayout, gen: int) -> Plan:
    """How to multiply `m` activations of a dtype on a generation of TPUs."""
    dtype, integer = jnp.dtype(dtype), layout.format in _INTEGER
    operand, halves = _BF16, False
    if dtype == _INT8 and integer:
        operand = _INT8
        if gen >= 7 and layout.symmetric and layout.format != "int8":
            # Two halves are twice the rows: worth it while decoding takes longer.
            halves = m <= 128
            top = 8 if layout.format == "int4" else 1
            if halves:
                operand = _E4M3
            elif 128 * top * layout.k <= 1 << 24:  # float32 sums are exact
                operand = _BF16
    elif dtype in (_F32, jnp.float16):
        operand = _F32
    rows = -(-m // 8) * 8 if m <= 256 else 256
    grouped, run = layout.groups > 1, group_run(layout)
    scaled = grouped and operand == _F32
    if grouped and operand == _BF16:
        exact = layout.format in MICROSCALING or (
            layout.format in ("t2", "sherry") and layout.scale_dtype == "bfloat16"
        )
        # One product of full depth instead of many short ones.
        scaled = run < 32 or ((exact or run < 128) and rows >= 64)
    count, n = tiles(layout), padded_n(layout)
    k = TILE * (count if count <= 8 else 4)
    wide = 256 if operand == _F32 else 1024 if rows <= 32 and n % 1024 == 0 else 512
    if not grouped or scaled:
        # The fifth generation's matrix unit is 128 deep: short steps overlap better.
        run = 128 if gen <= 5 and rows <= 64 and operand == _INT8 else k
    return Plan(operand, halves, scaled, run, rows, min(wide, n), k)


def matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    gen: int | None = None,
) -> jax.Array:
    """`x [M, K]` times prepared planes.

    Args:
      x: a float dtype or int8.
      planes: of the order "tpu".
      layout: theirs.
      x_scale: float32 [M, 1] for int8 `x`.
      bias: [N].
      activation: "int8" quantizes float `x` first.
      out_dtype: of the result.
      gen: generation of the TPU, default that of the current device.

    Returns:
      [M, N].
    """
    if activation == "int8" and x.dtype != jnp.int8:
        x, x_scale = quantize_activation(x)
    p = plan(x.shape[0], x.dtype, layout, generation() if gen is None else gen)
    out_dtype = jnp.dtype(out_dtype)
    # Mosaic has no float16.
    dtype = _F32 if out_dtype == jnp.float16 else out_dtype
    args = dict(planes, x=_arranged(x, layout, p))
    if x_scale is not None:
        args["x_scale"] = x_scale
    if bias is not None:
        padding = padded_n(layout) - layout.n
        args["bias"] = jnp.pad(bias.astype(jnp.float32), (0, padding))[None]
    shape = jax.ShapeDtypeStruct((x.shape[0], layout.n), dtype)

    def call(args: dict[str, jax.Array], interpret: bool) -> jax.Array:
        return pl.pallas_call(
            lambda refs, y, acc: _kernel(refs, y, acc, layout, p),
            out_shape=shape,
            grid=(
                -(-x.shape[0] // p.m),
                -(-layout.n // p.n),
                tiles(layout) * TILE // p.k,
            ),
            in_specs=[{name: _spec(name, args, layout, p) for name in args}],
            out_specs=pl.BlockSpec((p.m, p.n), lambda i, j, k: (i, j)),
            scratch_shapes=[_accumulator(layout, p)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=f"{layout.format}_matmul",
            interpret=interpret,
        )(args)

    y = jax.lax.platform_dependent(
        args,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=True),
    )
    return y.astype(out_dtype)


def _arranged(x: jax.Array, layout: WeightLayout, p: Plan) -> jax.Array:
    """Activations in the operand's dtype, padded to blocks, in the weights' order."""
    m = x.shape[0]
    rows = -(-m // p.m) * p.m if p.halves else m
    x = jnp.pad(x, ((0, rows - m), (0, tiles(layout) * TILE - x.shape[1])))
    if layout.format == "sherry" and layout.group_stride == 16:
        x = x.reshape(rows, -1, 4, 16).swapaxes(2, 3).reshape(rows, -1)
    if p.halves:
        blocks = x.reshape(-1, 1, p.m, x.shape[1]).astype(jnp.int32)
        both = jnp.concatenate([blocks >> 4, blocks & 15], axis=1)
        x = both.reshape(2 * rows, -1).astype(jnp.float32)
    return x.astype(p.operand)


def _spec(name: str, args: dict[str, Any], layout: WeightLayout, p: Plan) -> Any:
    rows = args[name].shape[0]
    if name == "x":
        return pl.BlockSpec((p.m * (1 + p.halves), p.k), lambda i, j, k: (i, k))
    if name == "x_scale":
        return pl.BlockSpec((p.m, 1), lambda i, j, k: (i, 0))
    if rows == 1:
        return pl.BlockSpec((1, p.n), lambda i, j, k: (0, j))
    blocks = tiles(layout) * TILE // p.k
    return pl.BlockSpec((rows // blocks, p.n), lambda i, j, k: (k, j))


def _by_runs(layout: WeightLayout, p: Plan) -> bool:
    """Whether each run's sums are scaled on their own."""
    return layout.groups > 1 and not p.scaled


def _accumulator(layout: WeightLayout, p: Plan) -> Any:
    if _by_runs(layout, p):
        return pltpu.VMEM((p.m, p.n), jnp.float32)
    return pltpu.VMEM((p.m * (1 + p.halves), p.n), _sum_dtype(p))


def _sum_dtype(p: Plan) -> Any:
    return jnp.int32 if p.operand == _INT8 else jnp.float32


def _kernel(refs: Any, y: Any, acc: Any, layout: WeightLayout, p: Plan) -> None:
    """Adds one block of K to `acc` and, after the last one, writes `y`."""
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    part = _block(refs, layout, p)

    @pl.when(first)
    def _() -> None:
        acc[...] = part

    @pl.when(jnp.logical_not(first))
    def _() -> None:
        acc[...] += part

    @pl.when(last)
    def _() -> None:
        total = acc[...]
        if not _by_runs(layout, p):
            total = _joined(total, p)
        # Scaled weights have their factor, and so have sums of scaled runs their scale.
        factor = 1.0 if p.scaled else decode.factor(layout, p.operand)
        out = total * factor
        if layout.groups == 1:
            out = out * decode.scale_rows(refs["scale"][...], layout)
        if "scale2" in refs:
            out = out * refs["scale2"][...]
        if "x_scale" in refs:
            out = out * refs["x_scale"][...]
        if "bias" in refs:
            out = out + refs["bias"][...]
        y[...] = out.astype(y.dtype)


def _joined(sums: jax.Array, p: Plan) -> jax.Array:
    """float32 sums of whole activations."""
    sums = sums.astype(jnp.float32)
    return 16.0 * sums[: p.m] + sums[p.m :] if p.halves else sums


def _block(refs: Any, layout: WeightLayout, p: Plan) -> jax.Array:
    """Sums over a block of K, as they are accumulated."""
    w = decode.block(refs, layout, p.operand)
    if p.scaled:
        w = _scaled(w, refs, layout, p)
    total = None
    for start in range(0, p.k, p.run):
        stop = min(start + p.run, p.k)
        x = refs["x"][:, start:stop]
        part = jnp.dot(
            x,
            w[start:stop],
            precision=jax.lax.Precision.HIGHEST if p.operand == _F32 else None,
            preferred_element_type=_sum_dtype(p),
        )
        grouped = _by_runs(layout, p)
        row = start // scale_run(layout) if grouped else 0
        if "zero" in refs and not p.scaled:
            zero = refs["zero"][row : row + 1].astype(part.dtype)
            part -= jnp.sum(x.astype(part.dtype), axis=1, keepdims=True) * zero
        if grouped:
            rows = refs["scale"][row : row + 1]
            part = _joined(part, p) * decode.scale_rows(rows, layout)
        total = part if total is None else total + part
    assert total is not None
    return total


def _scaled(w: jax.Array, refs: Any, layout: WeightLayout, p: Plan) -> jax.Array:
    """Weights `[K', N']` less their zeros, times their scales."""
    scale = decode.scale_rows(refs["scale"][...], layout)
    scale = scale * decode.factor(layout, p.operand)
    run, pieces = scale_run(layout), []
    for i in range(p.k // run):
        piece = w[i * run : (i + 1) * run].astype(jnp.float32)
        if "zero" in refs:
            piece -= refs["zero"][i : i + 1].astype(jnp.float32)
        pieces.append((piece * scale[i : i + 1]).astype(p.operand))
    return jnp.concatenate(pieces, axis=0)
