"""Block-sparse attention with FP8 keys and values on Hopper GPUs (H100, H200).

The kernel of `mosaic_gpu` with both products in e4m3, which the tensor cores run at
twice the rate of bfloat16. What differs:

- Queries are in e4m3 with a scale for each row, which takes in the scale of the keys
  and that of the logits.
- Weights are in e4m3 times 2^8: 1 becomes 256, and what is below 2^-18 becomes 0.
- 8-bit products read their second operand along the sum only, so that values lie with
  the keys last; and they want four neighbours of a row from a thread that has two pairs
  of them. As the order of a sum is free, values are stored in the order in which the
  threads have the weights (`_float8.out_of_order`): no thread needs those of another.
- 8-bit products add with 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). A step
  therefore has sums of its own, which are then added to the others in float32, for the
  price of the multiplication that rescales those. Rows of more than 128 numbers leave
  no registers for that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as asm
from pallas_kernels._ptx import Float, Int
from pallas_kernels.block_sparse_attention import _hopper_tiles as tiles
from pallas_kernels.block_sparse_attention._float8 import (
    FLOAT8,
    MOST,
    Float8KV,
    in_order,
    power_of_two,
)
from pallas_kernels.block_sparse_attention._hopper_tiles import (
    LEAST,
    ROWS,
    TILE,
    Tile,
)
from pallas_kernels.block_sparse_attention._lists import BlockLists

_SHIFT = 8  # weights are times 2^8


@dataclasses.dataclass(frozen=True)
class Shape(tiles.Shape):
    """Everything static about one kernel."""

    stages: int = 3
    promote: bool = True  # sums of a step go to float32 before they go to the others


def unsupported(q: Any, kv: Float8KV, lists: BlockLists) -> str | None:
    """Why this cannot run here, or None."""
    del kv
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"its results are bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 32 or q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} is no multiple of 32 up to 256"
    if lists.block_q % TILE:
        return f"block_q {lists.block_q} is no multiple of {TILE}"
    if lists.block_k % 64:
        return f"block_k {lists.block_k} is no multiple of 64"
    return None


def attention(
    q: jax.Array,
    kv: Float8KV,
    lists: BlockLists,
    *,
    scale: float,
    q_offset: jax.Array,
    soft_cap: float | None,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array]:
    """See `_call`; lse is that of keys without their mean.

    `tuning` overrides fields of `Shape`.
    """
    t, dim = q.shape[1], q.shape[3]
    # Else XLA may make lists again wherever they are read.
    lists = lax.optimization_barrier(lists)
    heading = tiles.heading(lists, t, kv.k.shape[1], q_offset)
    # Copies go by 8 rows.
    q, k = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, kv.k)
    )
    wide = dim > 128
    shape = Shape(
        **tiles.fields(q, k, lists, scale, soft_cap),
        dtype=q.dtype.name,
        **{
            "step": 64 if wide or lists.block_k % 128 else 128,
            "promote": not wide,
            **tuning,
        },
    )
    arrays = q, k, kv.v, kv.k_scale, kv.v_scale
    y, lse = build(shape)(*arrays, lists.indices, heading, q_offset)
    return y[:, :t], lse[..., :t]


def _unit(c: Shape) -> float:
    """Of the logits before the cap, or before powers of 2 are taken."""
    return c.scale / c.soft_cap if c.soft_cap else c.scale * math.log2(math.e)


@functools.lru_cache(maxsize=512)
def build(c: Shape) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel `(q, k, v, k_scale, v_scale, indices, heading, q_offset) -> (y, lse)`.

    q is in the dtype of the result; for `heading` see there. lse has rows up to a
    multiple of the tile.
    """
    kind = jnp.dtype(c.dtype)
    wide, narrow = tiles.transforms(c.dim, 1), tiles.transforms(c.step, 1)
    ring = functools.partial(plgpu.Barrier, num_barriers=c.stages)
    params: dict[str, Any] = {}
    if c.interpret:
        params["interpret"] = plgpu.InterpretGPUParams()
    return plgpu.kernel(
        functools.partial(_body, c),
        out_type=(
            jax.ShapeDtypeStruct((c.batch, c.q_length, c.heads, c.dim), kind),
            jax.ShapeDtypeStruct((c.batch, c.heads, c.tiles * TILE), jnp.float32),
        ),
        grid=(c.batch * c.heads * c.tiles,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        scratch_types=(
            plgpu.SMEM((2, ROWS, c.dim), FLOAT8, transforms=wide),
            plgpu.SMEM((c.stages, c.step, c.dim), FLOAT8, transforms=wide),
            plgpu.SMEM((c.stages, c.dim, c.step), FLOAT8, transforms=narrow),
            # Queries as they come, then results.
            plgpu.SMEM((2, ROWS, c.dim), kind, transforms=tiles.transforms(c.dim, 2)),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            ring(),
            ring(num_arrivals=2),
            ring(),
            ring(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=512,
        ),
        **params,
    )


def _body(c: Shape, *refs: Any) -> None:
    group = lax.axis_index("group")

    @pl.when(group == 2)
    def _copies() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _, k, v, _, _, indices, heading, *_ = refs
        at = Tile(c, indices, heading)
        sources = (
            (lambda keys: k.at[at.batch, keys, at.kv_head], refs[11]),
            (lambda keys: v.at[at.batch, at.kv_head, :, keys], refs[12]),
        )
        tiles.copy(c, at, sources, refs[16:])

    @pl.when(group < 2)
    def _computes() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(c, group, *refs)


def _compute(c: Shape, group: Any, *refs: Any) -> None:
    """A warpgroup that attends for 64 queries."""
    q, _, _, k_scale, v_scale, indices, heading, offset, y, lse = refs[:10]
    q_smem, k_smem, v_smem, y_smem, lse_smem = refs[10:15]
    q_full, k_full, k_free, v_full, v_free = refs[15:]
    at = Tile(c, indices, heading)
    first = at.first + group * ROWS
    queries, result = q_smem.at[group], y_smem.at[group]
    here = pl.ds(first, ROWS)
    plgpu.copy_gmem_to_smem(q.at[at.batch, here, at.head], result, q_full.at[group])
    # Where the list is empty no query sees anything.
    position = jnp.where(at.count > 0, first + offset[at.batch], -(2**30))
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def slot(s: Any) -> Any:
        return lax.rem(s, c.stages)

    def over(rows: Any, x: Any) -> Any:
        return lax.broadcast_in_dim(rows, x.shape, [0])

    def hide(s: Any, logits: Any) -> Any:
        return _hide(c, logits, position - at.key_of(s, at.block_of(s)))

    def expect_keys(s: Any) -> None:
        @pl.when(s < at.steps)
        def _() -> None:
            plgpu.barrier_wait(k_full.at[slot(s)])

    plgpu.barrier_wait(q_full.at[group])
    given = result[...].astype(jnp.float32)
    if not c.interpret:
        given = plgpu.layout_cast(given, plgpu.Layout.WGMMA)
    row_scale, inverse = power_of_two(jnp.abs(given).max(axis=1))
    given = jnp.clip(given * over(inverse, given), -MOST, MOST)
    queries[...] = given.astype(FLOAT8)
    plgpu.commit_smem()
    factor = row_scale * (k_scale[at.batch, at.kv_head] * _unit(c))

    def softmax(logits: Any, m: Any, total: Any) -> Any:
        """Weights times 2^8, the new maximum, their sum, the factor of old ones."""
        if c.soft_cap is None:
            new = jnp.maximum(m, logits.max(axis=1) * factor)
            logits = logits * over(factor, logits)
        else:
            unit = c.soft_cap * math.log2(math.e)
            new = jnp.maximum(m, logits.max(axis=1) * unit)
            logits = logits * unit
        shrink = jnp.exp2(m - new)
        p = jnp.exp2(logits - over(new - _SHIFT, logits))
        return _weights(c, p), new, total * shrink + p.sum(axis=1), shrink

    def logits_of(acc: Any, s: Any, waiting: int) -> Any:
        logits = plgpu.wgmma_accumulator_load(acc, wait_n=waiting)
        plgpu.barrier_arrive(k_free.at[slot(s)])
        if c.soft_cap is not None:
            logits = jnp.tanh(logits * over(factor, logits))
        return logits

    def start_values(into: Any, p: Any, s: Any) -> None:
        plgpu.barrier_wait(v_full.at[slot(s)])
        if fresh:
            into[...] = _zeros(c)
        if not c.interpret:
            plgpu.wgmma(into, p, v_smem.at[slot(s)].T)

    def values_of(into: Any, p: Any, s: Any) -> Any:
        if c.interpret:  # which has no products of registers
            v = in_order(v_smem[slot(s)].astype(jnp.float32))
            sums = jnp.dot(p.astype(jnp.float32), v.T)
        else:
            sums = plgpu.wgmma_accumulator_load(into, wait_n=0)
        plgpu.barrier_arrive(v_free.at[slot(s)])
        return sums

    # Sums of values are carried as numbers, or stay in the accumulator.
    stay = not c.promote and not c.interpret
    products = plgpu.ACC((ROWS, c.step), jnp.float32)
    fresh = [] if stay or c.interpret else [plgpu.ACC((ROWS, c.dim), jnp.float32)]

    def run(held: Any) -> Any:
        def step(hidden: bool, s: Any, carry: Any) -> Any:
            m, total, p, shrink, sums = carry

            def inside(acc: Any, *parts: Any) -> Any:
                into = parts[0] if parts else held
                plgpu.wgmma(acc, queries, k_smem.at[slot(s)].T)
                start_values(into, p, s - 1)
                logits = logits_of(acc, s, 1)
                if hidden:
                    logits = hide(s, logits)
                # The wait for the values must not move before what is to hide it: the
                # barrier keeps LLVM from that, the branches keep ptxas.
                new = lax.optimization_barrier(softmax(logits, m, total))
                expect_keys(s + 1)
                return *new, values_of(into, p, s - 1)

            got = pl.run_scoped(inside, products, *fresh)
            new, m, total, after, part = got
            # Only here: `wgmma` must not run while registers for it are made.
            new = _operand(c, new)
            if stay:
                held[...] = part * over(after, part)
                return m, total, new, after, None
            return m, total, new, after, sums * over(shrink, sums) + part

        def begin(acc: Any) -> Any:
            plgpu.wgmma(acc, queries, k_smem.at[0].T)
            return hide(0, logits_of(acc, 0, 0))

        rows = functools.partial(plgpu.layout_cast, new_layout=by_row)
        m = rows(jnp.full((ROWS,), LEAST, jnp.float32))
        total = rows(jnp.zeros((ROWS,), jnp.float32))
        expect_keys(0)
        p, m, total, shrink = softmax(pl.run_scoped(begin, products), m, total)
        p = _operand(c, p)
        expect_keys(1)
        sums = None
        if not stay:
            sums = jnp.zeros((ROWS, c.dim), jnp.float32)
            if not c.interpret:
                sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA)
        carry = m, total, p, shrink, sums
        carry = lax.fori_loop(1, at.masked, functools.partial(step, True), carry)
        carry = lax.fori_loop(
            at.masked, at.steps, functools.partial(step, False), carry
        )
        m, total, p, shrink, sums = carry
        end = at.steps - 1

        def finish(*parts: Any) -> Any:
            into = parts[0] if parts else held
            start_values(into, p, end)
            return values_of(into, p, end)

        last = pl.run_scoped(finish, *fresh) if fresh else finish()
        if not stay:
            last = sums * over(shrink, sums) + last
        return last, m, total

    if stay:
        values, m, total = pl.run_scoped(run, plgpu.ACC((ROWS, c.dim), jnp.float32))
    else:
        values, m, total = run(None)
    some = total > 0
    inverse = jnp.where(some, v_scale[at.batch, at.kv_head] / total, 0.0)
    result[...] = (values * over(inverse, values)).astype(c.dtype)
    log = (m + jnp.log2(total) - _SHIFT) * math.log(2)
    lse_smem.at[group][...] = jnp.where(some, log, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, y.at[at.batch, here, at.head])
    plgpu.copy_smem_to_gmem(lse_smem.at[group], lse.at[at.batch, at.head, here])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _zeros(c: Shape) -> Any:
    """To start sums from.

    ptxas then lets the first product write instead of add, if the zero is made just
    before; LLVM would take the one that the logits start from.
    """
    shape = (ROWS, c.dim)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(), return_type=result)
    def zeros(_: Any) -> Any:
        zero = asm.ptx("mov.b32 $0, 0f00000000;", out=(Float,))
        registers = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        registers.fill(asm.pair(zero, zero))
        return fa.FragmentedArray(
            _registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None
        )

    return zeros()


def _hide(c: Shape, logits: Any, diagonal: Any) -> Any:
    """-inf in the columns of row r from `r + diagonal + 1` on."""
    if c.interpret:
        row, column = (jnp.arange(n) for n in logits.shape)
        return jnp.where(column <= row[:, None] + diagonal, logits, -jnp.inf)
    wgmma = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(logits.shape, jnp.float32, layout=wgmma)

    # Written with `broadcasted_iota` this keeps a register for each column of a thread
    # over the whole loop, and there are none left.
    @plgpu.inline_mgpu(arg_types=(wgmma, plgpu.Layout.WG_SPLAT), return_type=result)
    def hide(_: Any, x: Any, diagonal: Any) -> Any:
        (diagonal,) = diagonal.registers.flat
        thread = asm.special("tid.x") & 127
        row = (thread >> 5) * 16 + ((thread & 31) >> 2)
        last = Int(diagonal) + row - (thread & 3) * 2  # column, from the first
        out = np.empty_like(x.registers)
        for i, (at, pair) in enumerate(np.ndenumerate(x.registers)):
            column, rows = 8 * (i // 2), 8 * (i % 2)
            hidden = Float.of(-math.inf)
            out[at] = asm.pair(
                *(
                    asm.select(last.less(column + n - rows), hidden, value)
                    for n, value in enumerate(asm.floats_of(pair))
                )
            )
        return fa.FragmentedArray(
            _registers=out, _layout=fa.WGMMA_LAYOUT, _is_signed=None
        )

    return hide(logits, diagonal)


def _weights(c: Shape, p: Any) -> Any:
    """Weights in e4m3 where the threads have them: keys in the order of `Float8KV.v`.

    Not yet what is multiplied: pairs are swapped, see `_operand`.
    """
    if c.interpret:  # where arrays are whole, and so is their order
        return p.astype(FLOAT8)
    result = plgpu.ShapeDtypeStruct(p.shape, FLOAT8, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def convert(_: Any, x: Any) -> Any:
        return _fragment(merged(x.registers, p.shape, _four))

    return convert(p)


def _operand(c: Shape, p: Any) -> Any:
    """Swaps the pairs of `_weights`.

    Registers for the next product must not be made while the tensor cores work, or
    ptxas waits for these first. That of a step runs until its weights are done, so
    they come in other registers and are moved behind the wait, one instruction for
    four. ptxas would see through plain moves.
    """
    if c.interpret:
        return p
    kind = plgpu.Layout.WGMMA_8BIT
    result = plgpu.ShapeDtypeStruct(p.shape, FLOAT8, layout=kind)

    @plgpu.inline_mgpu(arg_types=(kind,), return_type=result)
    def swap(_: Any, x: Any) -> Any:
        out = np.empty_like(x.registers)
        for at, four in np.ndenumerate(x.registers):
            code = "prmt.b32 $0, $1, $1, 0x1032;"
            out[at] = asm.as_float8(asm.ptx(code, asm.word(four), out=(Int,)))
        return _fragment(out)

    return swap(p)


def _fragment(registers: Any) -> Any:
    return fa.FragmentedArray(
        _registers=registers, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=None
    )


def merged(registers: Any, shape: tuple[int, ...], four: Callable[..., Any]) -> Any:
    """Pairs of columns as accumulators of `wgmma` have them, by fours as operands.

    A thread has columns 2 b and 2 b + 1 (b its place among four) of each 8, in rows r
    and r + 8; as an operand it has four columns of each 16.
    """
    pairs = registers.reshape(shape[1] // 16, 2, 2)  # 16 columns, 8 of them, rows
    out = np.empty((shape[1] // 16, 2), dtype=object)
    for i, row in np.ndindex(out.shape):
        out[i, row] = four(pairs[i, 0, row], pairs[i, 1, row])
    return out.reshape(fa.WGMMA_LAYOUT_8BIT.registers_shape(shape))


def _four(a: Any, b: Any) -> Any:
    """Two pairs of float32 to four e4m3, the second pair first."""
    word = asm.ptx(
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {b, a}; }",
        *asm.floats_of(a),
        *asm.floats_of(b),
        out=(Int,),
        pure=True,
    )
    return asm.as_float8(word)
