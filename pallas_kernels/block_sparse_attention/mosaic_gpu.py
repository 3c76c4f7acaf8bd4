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

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._lists import BlockLists, visible_blocks

_tiling: Any = plgpu.TilingTransform  # for mypy they are abstract
_swizzle: Any = plgpu.SwizzleTransform

_ROWS = 64  # queries of a warpgroup
_TILE = 2 * _ROWS
_LEAST = -1e30  # a maximum over nothing; finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static about one kernel."""

    batch: int
    q_length: int
    k_length: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    list_batch: int
    list_heads: int
    block_q: int
    block_k: int
    scale: float
    soft_cap: float | None
    step: int = 128  # keys of one step
    stages: int = 2
    interpret: bool = False

    @property
    def list_rows(self) -> int:
        """Lists of one head."""
        return -(-self.q_length // self.block_q)

    @property
    def tiles(self) -> int:
        """Tiles of queries of one head."""
        return -(-self.q_length // _TILE)

    @property
    def transforms(self) -> Any:
        """How a row of `dim` 16-bit numbers lies in shared memory."""
        columns = next(c for c in (64, 32, 16) if self.dim % c == 0)
        return _tiling((8, columns)), _swizzle(2 * columns)


def unsupported(q: Any, k: Any, v: Any, lists: BlockLists) -> str | None:
    """Why this cannot run here, or None."""
    del k, v
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"its tensor cores take bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 16 or q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} is no multiple of 16 up to 256"
    if lists.block_q % _TILE:
        return f"block_q {lists.block_q} is no multiple of {_TILE}"
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
    batch, t, heads, dim = q.shape
    # Else XLA may make lists again wherever they are read.
    lists = lax.optimization_barrier(lists)
    # The leading entries that every query of a block sees whole need no mask.
    whole, _ = visible_blocks(t, k.shape[1], lists.block_q, lists.block_k, q_offset)
    entry = jnp.arange(lists.width)
    inside = entry < lists.counts[..., None]
    unmasked = inside & (lists.indices < whole[:, None, :, None])
    full = jnp.sum(unmasked, axis=-1, dtype=jnp.int32)
    # A tile starts with these three, so they lie together.
    end = jnp.maximum(lists.counts - 1, 0)[..., None]
    last = jnp.take_along_axis(lists.indices, end, axis=-1)[..., 0]
    last = jnp.where(lists.counts > 0, last, 0)
    heading = jnp.stack(jnp.broadcast_arrays(lists.counts, full, last), axis=-1)
    # Copies go by 8 rows.
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k, v)
    )
    narrow = dim > 128 or lists.block_k % 128
    shape = Shape(
        batch=batch,
        q_length=q.shape[1],
        k_length=k.shape[1],
        heads=heads,
        kv_heads=k.shape[2],
        dim=dim,
        dtype=q.dtype.name,
        list_batch=lists.indices.shape[0],
        list_heads=lists.indices.shape[1],
        block_q=lists.block_q,
        block_k=lists.block_k,
        scale=scale,
        soft_cap=soft_cap,
        **{"step": 64 if narrow else 128, **tuning},
    )
    y, lse = build(shape)(q, k, v, lists.indices, heading.reshape(-1), q_offset)
    return y[:, :t], lse[..., :t]


@functools.lru_cache(maxsize=512)
def build(c: Shape) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel `(q, k, v, indices, heading, q_offset) -> (y, lse)`.

    `heading` is int32 `[B, list heads, num_q_blocks, 3]`, flat: blocks of a list, how
    many of them, from the first, need no mask, and the last one. lse has rows up to a
    multiple of the tile.
    """
    kind = jnp.dtype(c.dtype)
    pool = functools.partial(plgpu.SMEM, dtype=kind, transforms=c.transforms)
    ring = functools.partial(plgpu.Barrier, num_barriers=c.stages)
    params: dict[str, Any] = {}
    if c.interpret:
        params["interpret"] = plgpu.InterpretGPUParams()
    return plgpu.kernel(
        functools.partial(_body, c),
        out_type=(
            jax.ShapeDtypeStruct((c.batch, c.q_length, c.heads, c.dim), kind),
            jax.ShapeDtypeStruct((c.batch, c.heads, c.tiles * _TILE), jnp.float32),
        ),
        grid=(c.batch * c.heads * c.tiles,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        scratch_types=(
            pool((2, _ROWS, c.dim)),
            pool((c.stages, c.step, c.dim)),
            pool((c.stages, c.step, c.dim)),
            plgpu.SMEM((2, _ROWS), jnp.float32),
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


class _Tile:
    """What a thread block has to do."""

    def __init__(self, c: Shape, indices: Any, heading: Any) -> None:
        self.c, self.indices = c, indices
        # Tiles that read the same keys run together, which keeps those in the cache;
        # among them the longest lists start first.
        group = c.heads // c.kv_heads
        block = lax.axis_index("block")
        rest, member = lax.div(block, group), lax.rem(block, group)
        rest, row = lax.div(rest, c.tiles), lax.rem(rest, c.tiles)
        self.batch, self.kv_head = lax.div(rest, c.kv_heads), lax.rem(rest, c.kv_heads)
        self.head = self.kv_head * group + member
        self.first = (c.tiles - 1 - row) * _TILE
        list_head = {c.heads: self.head, c.kv_heads: self.kv_head}.get(c.list_heads, 0)
        list_row = lax.div(self.first, c.block_q)
        self.list = (self.batch if c.list_batch > 1 else 0, list_head, list_row)
        at = (self.batch * c.list_heads + list_head) * c.list_rows + list_row
        self.count, full, self.last = (heading[3 * at + i] for i in range(3))
        self.parts = c.block_k // c.step
        # A list without blocks makes a step in which no query sees anything.
        self.steps = jnp.maximum(self.count, 1) * self.parts
        self.masked = jnp.maximum(self.steps - full * self.parts, 1)

    def block_of(self, s: Any) -> Any:
        """The block of a step; lists are read from their end."""
        block = self.indices[(*self.list, lax.div(self.steps - 1 - s, self.parts))]
        return jnp.where(self.count > 0, block, 0)  # what lies behind a list is rubbish

    def key_of(self, s: Any, block: Any) -> Any:
        """The first key of a step in its block."""
        part = lax.rem(self.steps - 1 - s, self.parts)
        return block * self.c.block_k + part * self.c.step


def _body(c: Shape, *refs: Any) -> None:
    group = lax.axis_index("group")

    @pl.when(group == 2)
    def _copies() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _copy(c, *refs)

    @pl.when(group < 2)
    def _computes() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(c, group, *refs)


def _copy(c: Shape, *refs: Any) -> None:
    """The warpgroup that brings keys and values."""
    _, k, v, indices, heading, *_ = refs
    k_smem, v_smem, _, _, *ring = refs[9:]
    at = _Tile(c, indices, heading)

    def bring(s: Any, block: Any, again: bool) -> None:
        slot, keys = lax.rem(s, c.stages), pl.ds(at.key_of(s, block), c.step)
        for x, x_smem, full, free in zip(
            (k, v), (k_smem, v_smem), ring[::2], ring[1::2], strict=True
        ):
            if again:
                plgpu.barrier_wait(free.at[slot])
            plgpu.copy_gmem_to_smem(
                x.at[at.batch, keys, at.kv_head],
                x_smem.at[slot],
                full.at[slot],
            )

    bring(0, at.last, False)
    for ahead in range(1, c.stages):

        @pl.when(ahead < at.steps)
        def _(ahead: int = ahead) -> None:
            bring(ahead, at.block_of(ahead), False)

    def step(s: Any, block: Any) -> Any:
        # Read before the wait for a place to put what it names.
        following = at.block_of(jnp.minimum(s + 1, at.steps - 1))
        bring(s, block, True)
        return following

    start = at.block_of(jnp.minimum(c.stages, at.steps - 1))
    lax.fori_loop(c.stages, at.steps, step, start)
    if c.interpret:  # which wants every arrival to be seen
        for s in range(c.stages):

            @pl.when(s < at.steps)
            def _(s: int = s) -> None:
                for free in ring[1::2]:
                    plgpu.barrier_wait(free.at[s])


def _compute(c: Shape, group: Any, *refs: Any) -> None:
    """A warpgroup that attends for 64 queries."""
    q, _, _, indices, heading, offset, y, lse = refs[:8]
    q_smem, k_smem, v_smem, lse_smem = refs[8:12]
    q_full, k_full, k_free, v_full, v_free = refs[12:]
    at = _Tile(c, indices, heading)
    first = at.first + group * _ROWS
    queries = q_smem.at[group]
    here = pl.ds(first, _ROWS)
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

            return pl.run_scoped(inside, plgpu.ACC((_ROWS, c.step), jnp.float32))

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
        m = rows(jnp.full((_ROWS,), _LEAST, jnp.float32))
        total = rows(jnp.zeros((_ROWS,), jnp.float32))
        plgpu.barrier_wait(q_full.at[group])
        expect_keys(0)
        p, m, total, _ = softmax(hide(0, logits_of(0)), m, total)
        expect_keys(1)
        sums = jnp.zeros((_ROWS, c.dim), jnp.float32) if c.interpret else None
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

    acc = plgpu.ACC((_ROWS, c.dim), jnp.float32)
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
