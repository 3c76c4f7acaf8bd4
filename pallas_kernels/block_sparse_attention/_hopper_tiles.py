"""What the Hopper kernels share: tiles of queries, and the warpgroup that copies.

A thread block takes a tile of 128 queries of one head, 64 for each of two warpgroups
that compute. A third one brings keys and values through a ring of stages in shared
memory. Lists are read from their end, so that masked blocks come first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._lists import BlockLists, visible_blocks

_tiling: Any = plgpu.TilingTransform  # for mypy they are abstract
_swizzle: Any = plgpu.SwizzleTransform

ROWS = 64  # queries of a warpgroup
TILE = 2 * ROWS
LEAST = -1e30  # a maximum over nothing; finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static about one kernel; `dtype` is that of the result."""

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
        return -(-self.q_length // TILE)


def transforms(columns: int, item_bytes: int) -> Any:
    """How rows of so many numbers lie in shared memory."""
    size = columns * item_bytes
    width = next(w for w in (128, 64, 32) if size % w == 0)
    return _tiling((8, width // item_bytes)), _swizzle(width)


def fields(
    q: jax.Array, k: jax.Array, lists: BlockLists, scale: float, soft_cap: float | None
) -> dict[str, Any]:
    """Fields of `Shape` of a call."""
    return {
        "batch": q.shape[0],
        "q_length": q.shape[1],
        "k_length": k.shape[1],
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "dim": q.shape[3],
        "list_batch": lists.indices.shape[0],
        "list_heads": lists.indices.shape[1],
        "block_q": lists.block_q,
        "block_k": lists.block_k,
        "scale": scale,
        "soft_cap": soft_cap,
    }


def heading(lists: BlockLists, t: int, s: int, q_offset: jax.Array) -> jax.Array:
    """int32 `[B, list heads, num_q_blocks, 3]`, flat: what a tile starts with.

    Blocks of a list, how many of them, from the first, need no mask, and the last one.
    """
    # The leading entries that every query of a block sees whole need no mask.
    whole, _ = visible_blocks(t, s, lists.block_q, lists.block_k, q_offset)
    entry = jnp.arange(lists.width)
    inside = entry < lists.counts[..., None]
    unmasked = inside & (lists.indices < whole[:, None, :, None])
    full = jnp.sum(unmasked, axis=-1, dtype=jnp.int32)
    # A tile starts with these three, so they lie together.
    end = jnp.maximum(lists.counts - 1, 0)[..., None]
    last = jnp.take_along_axis(lists.indices, end, axis=-1)[..., 0]
    last = jnp.where(lists.counts > 0, last, 0)
    parts = jnp.broadcast_arrays(lists.counts, full, last)
    return jnp.stack(parts, axis=-1).reshape(-1)


class Tile:
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
        self.first = (c.tiles - 1 - row) * TILE
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


def copy(c: Shape, at: Tile, sources: Any, ring: Any) -> None:
    """The warpgroup that brings keys and values.

    Args:
      c, at: the tile.
      sources: for keys and for values, `keys of a step -> their part of global memory`
        and the stages in shared memory.
      ring: barriers of full and free stages of keys, then of values.
    """

    def bring(s: Any, block: Any, again: bool) -> None:
        slot, keys = lax.rem(s, c.stages), pl.ds(at.key_of(s, block), c.step)
        for (part, stages), full, free in zip(
            sources, ring[::2], ring[1::2], strict=True
        ):
            if again:
                plgpu.barrier_wait(free.at[slot])
            plgpu.copy_gmem_to_smem(part(keys), stages.at[slot], full.at[slot])

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
