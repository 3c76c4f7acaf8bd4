"""Packed weights of experts times a few rows each: the decode kernels, by visits.

The grid of a decode kernel gets one more axis, over visits (`_visits`): a program reads
its expert and its rows from device memory and shifts the pointers of the kernel to
them. Visits that are left over return at once; those of rows without an expert write
zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper_bits, _hopper_bytes
from pallas_kernels import _hopper_tokens as tokens
from pallas_kernels import _ptx as asm
from pallas_kernels._ptx import Float
from pallas_kernels.ragged_matmul._visits import visit_bound, visits

Decode = _hopper_bits.Decode | _hopper_bytes.Decode
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def product(
    c: Decode,
    x: jax.Array,
    x_scale: jax.Array | None,
    planes: Sequence[jax.Array],
    group_sizes: jax.Array,
) -> jax.Array:
    """`x [T, K']` times the weights of experts in the order `hopper`.

    Args:
      c: the kernel for one visit, of `c.m <= T` rows.
      x: as the kernel reads it: padded along K, in its order.
      x_scale: of int8 `x`, float32 `[T, 1]`.
      planes: in the order of the kernel's arguments, `[E, ...]`.
      group_sizes: int32 `[E]`.

    Returns:
      `[T, N]`.
    """
    rows, experts = x.shape[0], group_sizes.shape[0]
    table, _ = visits(group_sizes, rows, c.m)
    if x.dtype != jnp.int8:
        x_scale = table  # is not read
    elif x_scale is None:
        x_scale = jnp.ones((rows, 1), jnp.float32)
    strides = tuple(math.prod(p.shape[1:]) * p.dtype.itemsize for p in planes)
    kernel = build(c, rows, experts, strides)
    return kernel(table, x, x_scale, *planes)


@functools.cache
def build(
    c: Decode, rows: int, experts: int, strides: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """The kernel `(visits, x, x_scale, *planes) -> y [T, N]`.

    Args:
      c: the kernel for one visit.
      rows: T.
      experts: E.
      strides: bytes of each plane of one expert.
    """

    def body(*refs: Any) -> None:
        types = (plgpu.RefType(),) * (len(strides) + 5)
        emit = functools.partial(_emit, c, experts, strides)
        plgpu.inline_mgpu(arg_types=types)(emit)(*refs)

    blocks = -(-c.row_blocks // c.rows_per_block)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, c.n), jnp.dtype(c.out_dtype)),
        grid=(visit_bound(rows, experts, c.m), blocks),
        grid_names=("visit", "rows"),
        num_threads=c.warps // 4,
        thread_name="group",
        scratch_types=(plgpu.SMEM((c.smem_words,), jnp.int32),),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


def _emit(
    c: Decode, experts: int, strides: tuple[int, ...], context: Any, *refs: Any
) -> None:
    table, x, x_scale, *planes, y, smem = (asm.pointer(r) for r in refs)
    visit = asm.special("ctaid.y")
    expert, first, lo, hi = asm.load(table, visit, 16, words=4, hint="global.nc")
    x = asm.offset(x, first, c.valid_k * _ITEM[c.x_dtype])
    x_scale = asm.offset(x_scale, first, 4)
    y = asm.offset(y, first, c.n * _ITEM[c.out_dtype])
    some = lo.less(hi)
    with asm.when(asm.both(some, expert.less(experts))):
        here = [asm.offset(p, expert, s) for p, s in zip(planes, strides, strict=True)]
        bits = isinstance(c, _hopper_bits.Decode)
        module: Any = _hopper_bits if bits else _hopper_bytes
        module.emit(c, context, x, x_scale, *here, y, smem, rows=(lo, hi))
    with asm.when(asm.both(some, expert.equals(experts))):
        _clear(c, y, (lo, hi))


def _clear(c: Decode, y: Any, rows: tuple[asm.Int, asm.Int]) -> None:
    """Zeros in the rows that belong to no expert."""
    thread = asm.special("tid.x")
    width = c.rows_per_block * _hopper_bits.ROWS
    block = asm.special("ctaid.x") * width
    for step in range(-(-width * c.m // (32 * c.warps))):
        i = thread + step * (32 * c.warps)
        token, column = i // width, block + i % width
        inside = tokens.among(rows, token, column.less(c.n))
        with asm.when(inside):
            tokens.write_output(c, y, None, None, token, column, Float.of(0.0))
