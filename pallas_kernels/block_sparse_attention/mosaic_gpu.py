"""Block-sparse attention on Hopper GPUs (H100, H200), by Pallas' Mosaic backend.

A thread block takes a tile of 128 queries of one head. One warpgroup copies keys and
values of the listed blocks ahead (TMA, through a ring of stages); two warpgroups of 64
queries each compute. Lists are read from their end: the blocks that need a causal mask
come first, and the main loop has none. In it the products of a block run beside the
softmax of another: the logits of step s and the values of step s - 1 are multiplied
while the warpgroup, and the other one, compute exponentials (FlashAttention-3, arXiv
2407.08608, sections 3.1 and 3.2).

Measured on an H100 and left out, each some percent slower: a persistent grid (lists in
turn or in pairs of long and short), several tiles for a thread block with the next
queries fetched ahead, turns of the warpgroups at the tensor cores, a third stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention import _hopper_tiles as tiles
from pallas_kernels.block_sparse_attention._hopper_tiles import (
    LEAST,
    ROWS,
    TILE,
    Shape,
    Tile,
)
from pallas_kernels.block_sparse_attention._lists import BlockLists


def unsupported(q: Any, k: Any, v: Any, lists: BlockLists) -> str | None:
    """Why this cannot run here, or None."""
    del k, v
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"its tensor cores take bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 16 or q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} is no multiple of 16 up to 256"
    if lists.block_q % TILE:
        return f"block_q {lists.block_q} is no multiple of {TILE}"
    if lists.block_k % 64:
        return f"block_k {lists.block_k} is no multiple of 64"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    *,
    scale: float,
    q_offset: jax.Array,
    soft_cap: float | None,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array]:
    """See `_call`; `tuning` overrides fields of `Shape`."""
    t, dim = q.shape[1], q.shape[3]
    # Else XLA may make lists again wherever they are read.
    lists = lax.optimization_barrier(lists)
    heading = tiles.heading(lists, t, k.shape[1], q_offset)
    # Copies go by 8 rows.
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k, v)
    )
    narrow = dim > 128 or lists.block_k % 128
    shape = Shape(
        **tiles.fields(q, k, lists, scale, soft_cap),
        dtype=q.dtype.name,
        **{"step": 64 if narrow else 128, **tuning},
    )
    y, lse = build(shape)(q, k, v, lists.indices, heading, q_offset)
    return y[:, :t], lse[..., :t]


@functools.lru_cache(maxsize=512)
def build(c: Shape) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel `(q, k, v, indices, heading, q_offset) -> (y, lse)`.

    For `heading` see there. lse has rows up to a multiple of the tile.
    """
    kind = jnp.dtype(c.dtype)
    lie = tiles.transforms(c.dim, 2)
    pool = functools.partial(plgpu.SMEM, dtype=kind, transforms=lie)
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
            pool((2, ROWS, c.dim)),
            pool((c.stages, c.step, c.dim)),
            pool((c.stages, c.step, c.dim)),
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
        _, k, v, indices, heading, *_ = refs
        at = Tile(c, indices, heading)
        sources = (
            (lambda keys: k.at[at.batch, keys, at.kv_head], refs[9]),
            (lambda keys: v.at[at.batch, keys, at.kv_head], refs[10]),
        )
        tiles.copy(c, at, sources, refs[13:])

    @pl.when(group < 2)
    def _computes() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(c, group, *refs)


def _compute(c: Shape, group: Any, *refs: Any) -> None:
    """A warpgroup that attends for 64 queries."""
    q, _, _, indices, heading, offset, y, lse = refs[:8]
    q_smem, k_smem, v_smem, lse_smem = refs[8:12]
    q_full, k_full, k_free, v_full, v_free = refs[12:]
    at = Tile(c, indices, heading)
    first = at.first + group * ROWS
    queries = q_smem.at[group]
    here = pl.ds(first, ROWS)
    plgpu.copy_gmem_to_smem(q.at[at.batch, here, at.head], queries, q_full.at[group])
    # Where the list is empty no query sees anything.
    position = jnp.where(at.count > 0, first + offset[at.batch], -(2**30))
    factor = (c.soft_cap or c.scale) * math.log2(math.e)  # softmax is of powers of 2

    def slot(s: Any) -> Any:
        return lax.rem(s, c.stages)

    def hide(s: Any, logits: Any) -> Any:
        shape, layout = logits.shape, plgpu.Layout.WGMMA
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
            for axis in range(2)
        )
        key = at.key_of(s, at.block_of(s))
        return jnp.where(row - column >= key - position, logits, -jnp.inf)

    def softmax(logits: Any, m: Any, total: Any) -> Any:
        new = jnp.maximum(m, logits.max(axis=1) * factor)
        shrink = jnp.exp2(m - new)
        p = jnp.exp2(logits * factor - lax.broadcast_in_dim(new, logits.shape, [0]))
        return p, new, total * shrink + p.sum(axis=1), shrink

    def expect_keys(s: Any) -> None:
        @pl.when(s < at.steps)
        def _() -> None:
            plgpu.barrier_wait(k_full.at[slot(s)])

    def run(o: Any) -> Any:
        def logits_of(s: Any, p: Any = None) -> Any:
            """Logits of step s; with p also starts the values of the step before."""

            def inside(acc: Any) -> Any:
                plgpu.wgmma(acc, queries, k_smem.at[slot(s)].T)
                if p is not None:
                    plgpu.barrier_wait(v_full.at[slot(s - 1)])
                    if not c.interpret:
                        plgpu.wgmma(o, p, v_smem.at[slot(s - 1)])
                got = plgpu.wgmma_accumulator_load(acc, wait_n=int(p is not None))
                plgpu.barrier_arrive(k_free.at[slot(s)])
                if c.soft_cap is not None:
                    got = jnp.tanh(got * (c.scale / c.soft_cap))
                return got

            return pl.run_scoped(inside, plgpu.ACC((ROWS, c.step), jnp.float32))

        def values_of(s: Any, p: Any, sums: Any) -> Any:
            """Sums of values with those of step s, which were started before."""
            if c.interpret:  # which has no products of registers
                values = v_smem[slot(s)].astype(jnp.float32)
                sums = sums + jnp.dot(p.astype(jnp.float32), values)
            else:
                sums = plgpu.wgmma_accumulator_load(o, wait_n=0)
            plgpu.barrier_arrive(v_free.at[slot(s)])
            return sums

        def step(hidden: bool, s: Any, carry: Any) -> Any:
            m, total, p, sums = carry
            logits = logits_of(s, p)
            if hidden:
                logits = hide(s, logits)
            # The wait for the values must not move before what is to hide it: the
            # barrier keeps LLVM from that, the branches keep ptxas.
            new, m, total, shrink = lax.optimization_barrier(softmax(logits, m, total))
            expect_keys(s + 1)
            sums = values_of(s - 1, p, sums)
            sums = sums * lax.broadcast_in_dim(shrink, sums.shape, [0])
            if not c.interpret:
                o[...] = sums
                sums = None
            return m, total, new.astype(c.dtype), sums

        rows = functools.partial(
            plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA.reduce(1)
        )
        m = rows(jnp.full((ROWS,), LEAST, jnp.float32))
        total = rows(jnp.zeros((ROWS,), jnp.float32))
        plgpu.barrier_wait(q_full.at[group])
        expect_keys(0)
        p, m, total, _ = softmax(hide(0, logits_of(0)), m, total)
        expect_keys(1)
        sums = jnp.zeros((ROWS, c.dim), jnp.float32) if c.interpret else None
        carry = m, total, p.astype(c.dtype), sums
        carry = lax.fori_loop(1, at.masked, functools.partial(step, True), carry)
        carry = lax.fori_loop(
            at.masked, at.steps, functools.partial(step, False), carry
        )
        m, total, p, sums = carry
        end = at.steps - 1
        plgpu.barrier_wait(v_full.at[slot(end)])
        if not c.interpret:
            plgpu.wgmma(o, p, v_smem.at[slot(end)])
        return values_of(end, p, sums), m, total

    acc = plgpu.ACC((ROWS, c.dim), jnp.float32)
    result, m, total = run(None) if c.interpret else pl.run_scoped(run, acc)
    some = total > 0
    inverse = jnp.where(some, 1 / total, 0.0)
    queries[...] = (result * lax.broadcast_in_dim(inverse, result.shape, [0])).astype(
        c.dtype
    )
    log = (m + jnp.log2(total)) * math.log(2)
    lse_smem.at[group][...] = jnp.where(some, log, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, y.at[at.batch, here, at.head])
    plgpu.copy_smem_to_gmem(lse_smem.at[group], lse.at[at.batch, at.head, here])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
