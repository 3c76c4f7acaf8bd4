"""The TPU kernel that gathers listed blocks: one grid step for each list.

K and V stay in HBM. Copies of `gather` blocks at a time fill one of two tiles in VMEM
while the matrix unit works on the other; the last tile of a list is computed while the
first one of the next list arrives. A list is read from a row of scalars,
`[whole, total, q_offset, blocks ...]`, two rows of which are in SMEM at any time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import _tpu_step as step

HEAD = 3  # scalars before the blocks of a row


@dataclasses.dataclass(frozen=True)
class _Copies:
    """From listed blocks in HBM to the two tiles of K (kind 0) and of V (kind 1)."""

    gather: int
    block_k: int
    sources: Any
    tiles: Any
    semaphores: Any

    def start(self, row: Any, total: Any, tile: Any, slot: Any) -> None:
        """Starts the copies of one tile of a list, as many as it has."""

        def one(i: Any, carry: Any) -> Any:
            key = first_key(row, tile * self.gather + i, self.block_k)
            to = pl.multiple_of(i * self.block_k, self.block_k)
            for kind in (0, 1):
                pltpu.make_async_copy(
                    self.sources[kind].at[pl.ds(key, self.block_k)],
                    self.tiles[kind].at[slot, pl.ds(to, self.block_k)],
                    self.semaphores.at[kind, slot],
                ).start()
            return carry

        jax.lax.fori_loop(0, self.count(total, tile), one, 0)

    def count(self, total: Any, tile: Any) -> Any:
        """Blocks of one tile."""
        return jnp.clip(total - tile * self.gather, 0, self.gather)

    def wait(self, kind: int, slot: Any, blocks: Any = None) -> None:
        """Waits for some blocks of a tile, default all; their bytes are counted."""
        rows = self.block_k if blocks is not None else self.gather * self.block_k
        to = self.tiles[kind].at[slot, pl.ds(0, rows)]
        copy = pltpu.make_async_copy(to, to, self.semaphores.at[kind, slot])

        def one(_: Any, carry: Any) -> Any:
            copy.wait()
            return carry

        jax.lax.fori_loop(0, 1 if blocks is None else blocks, one, 0)


def first_key(row: Any, at: Any, block_k: int) -> jax.Array:
    """Position of the first key of an entry."""
    return pl.multiple_of(row[0, HEAD + at] * block_k, block_k)


def _kernel(
    row: Any, following: Any, q: Any, k: Any, v: Any, y: Any, lse: Any,
    k_tiles: Any, v_tiles: Any, semaphores: Any, parity: Any, *state: Any,
    softmax: step.Softmax, gather: int, block_k: int, group: int,
) -> None:  # fmt: skip
    batch, head, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv = batch, head * q.shape[0] // group
    sources = k.at[kv], v.at[kv]
    copies = _Copies(gather, block_k, sources, (k_tiles, v_tiles), semaphores)
    whole, total, offset = row[0, 0], row[0, 1], row[0, 2]
    tiles = pl.cdiv(total, gather)
    next_total = jnp.where(i + 1 < pl.num_programs(2), following[0, 1], 0)

    @pl.when(i == 0)
    def _() -> None:
        parity[0] = 0
        copies.start(row, total, 0, 0)

    first = parity[0]

    @pl.when(tiles == 0)
    def _() -> None:
        copies.start(following, next_total, 0, first)

    step.reset(state)
    queries = q[...].reshape(softmax.rows, softmax.dim)

    def prefetch(tile: Any, slot: Any) -> None:
        @pl.when(tile < tiles)
        def _() -> None:
            copies.start(row, total, tile, slot)

        @pl.when(tile == tiles)
        def _() -> None:
            copies.start(following, next_total, 0, slot)

    def seen_whole(tile: Any, carry: Any) -> Any:
        slot = jax.lax.rem(first + tile, 2)
        prefetch(tile + 1, 1 - slot)
        copies.wait(0, slot)
        copies.wait(1, slot)
        step.update(softmax, state, queries, k_tiles[slot], v_tiles[slot])
        return carry

    def seen_in_part(tile: Any, carry: Any) -> Any:
        slot = jax.lax.rem(first + tile, 2)
        prefetch(tile + 1, 1 - slot)
        blocks = copies.count(total, tile)
        copies.wait(0, slot, blocks)
        copies.wait(1, slot, blocks)
        starts = [first_key(row, tile * gather + e, block_k) for e in range(gather)]
        at = step.positions(starts, block_k, blocks * block_k)
        seen = step.seen(at, offset + i * q.shape[1], q.shape[1], softmax)
        # What no copy has filled may be NaN, and 0 times that is NaN.
        values = v_tiles[slot]
        key = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(key < blocks * block_k, values, jnp.zeros_like(values))
        step.update(softmax, state, queries, k_tiles[slot], values, seen)
        return carry

    split = whole // gather
    jax.lax.fori_loop(0, split, seen_whole, 0)
    jax.lax.fori_loop(split, tiles, seen_in_part, 0)
    parity[0] = jax.lax.rem(first + tiles, 2)
    step.finish(state, y, lse)


def call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    *,
    softmax: step.Softmax,
    gather: int,
    block_q: int,
    block_k: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The kernel.

    Args:
      q: [B, groups, heads, T, D]; the heads of a group share lists.
      k, v: [B, Hkv, S, D], S a multiple of `block_k`.
      rows: int32 [B, list heads, num_q_blocks, 1, HEAD + width], with room for the
        last tile of the longest list.
      softmax: of the logits.
      gather: blocks of a tile.
      block_q, block_k: rows of a block.
      interpret: as in `pl.pallas_call`.

    Returns:
      y like q, and lse float32 [B, groups, num_q_blocks, 1, heads * block_q].
    """
    batch, groups, heads, _, dim = q.shape
    lists, blocks, _, width = rows.shape[1:]

    def row_spec(shift: int) -> Any:
        return pl.BlockSpec(
            (None, None, None, 1, width),
            lambda b, g, i: (
                b, g * lists // groups, jnp.minimum(i + shift, blocks - 1), 0, 0
            ),
            memory_space=pltpu.SMEM,
        )  # fmt: skip

    def spec(shape: Any, index: Any) -> Any:
        return pl.BlockSpec((None, None, *shape), index)

    q_spec = spec((heads, block_q, dim), lambda b, g, i: (b, g, 0, i, 0))
    tile = pltpu.VMEM((2, gather * block_k, dim), k.dtype)
    out = jax.ShapeDtypeStruct((batch, groups, blocks, 1, heads * block_q), jnp.float32)
    return pl.pallas_call(
        lambda *refs: _kernel(
            *refs,
            softmax=softmax,
            gather=gather,
            block_k=block_k,
            group=groups * heads // k.shape[1],
        ),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), out),
        grid=(batch, groups, blocks),
        in_specs=[
            row_spec(0),
            row_spec(1),
            q_spec,
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=(
            q_spec,
            pl.BlockSpec(
                (None, None, None, 1, heads * block_q), lambda b, g, i: (b, g, i, 0, 0)
            ),
        ),
        scratch_shapes=[
            tile,
            tile,
            pltpu.SemaphoreType.DMA((2, 2)),
            pltpu.SMEM((1,), jnp.int32),
            *softmax.scratch(),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="block_sparse_attention_gather",
        interpret=interpret,
    )(rows, rows, q, k, v)
