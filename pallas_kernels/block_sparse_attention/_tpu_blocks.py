"""The TPU kernel for large blocks: one grid step for each entry of a list.

Pallas' own pipeline copies the blocks: all lists are in SMEM, where the block of a step
is looked up. Beyond the end of a list the look-up repeats the last entry, so that idle
steps copy nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import _tpu_step as step


def _kernel(
    indices: Any, whole: Any, total: Any, offset: Any,
    q: Any, k: Any, v: Any, y: Any, lse: Any, *state: Any,
    softmax: step.Softmax, list_at: Any, width: int,
) -> None:  # fmt: skip
    batch, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    at = list_at(batch, pl.program_id(1), i)
    queries = q[...].reshape(softmax.rows, softmax.dim)

    @pl.when(s == 0)
    def _() -> None:
        step.reset(state)

    @pl.when(s < whole[at])
    def _() -> None:
        step.update(softmax, state, queries, k[...], v[...])

    @pl.when((s >= whole[at]) & (s < total[at]))
    def _() -> None:
        block_k = k.shape[0]
        starts = [indices[at * width + s] * block_k]
        positions = step.positions(starts, block_k, jnp.int32(block_k))
        start = offset[batch] + i * q.shape[1]
        seen = step.seen(positions, start, q.shape[1], softmax)
        step.update(softmax, state, queries, k[...], v[...], seen)

    @pl.when(s == width - 1)
    def _() -> None:
        step.finish(state, y, lse)


def call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    whole: jax.Array,
    total: jax.Array,
    q_offset: jax.Array,
    *,
    softmax: step.Softmax,
    block_q: int,
    block_k: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The kernel.

    Args:
      q: [B, groups, heads, T, D]; the heads of a group share lists.
      k, v: [B, Hkv, S, D], S a multiple of `block_k`.
      indices: int32 [B, list heads, num_q_blocks, width].
      whole, total: int32 [B, list heads, num_q_blocks]; see `_steps`.
      q_offset: int32 [B].
      softmax: of the logits.
      block_q, block_k: rows of a block.
      interpret: as in `pl.pallas_call`.

    Returns:
      y like q, and lse float32 [B, groups, num_q_blocks, 1, heads * block_q].
    """
    batch, groups, heads, _, dim = q.shape
    lists, blocks, width = indices.shape[1:]
    group = groups * heads // k.shape[1]

    def list_at(b: Any, g: Any, i: Any) -> Any:
        return (b * lists + g * lists // groups) * blocks + i

    def key_block(
        b: Any, g: Any, i: Any, s: Any, indices: Any, whole: Any, total: Any, _: Any
    ) -> Any:
        del whole
        at = list_at(b, g, i)
        last = jnp.maximum(jnp.minimum(s, total[at] - 1), 0)
        return b, g * heads // group, indices[at * width + last], 0

    q_spec = pl.BlockSpec(
        (None, None, heads, block_q, dim), lambda b, g, i, *_: (b, g, 0, i, 0)
    )
    kv_spec = pl.BlockSpec((None, None, block_k, dim), key_block)
    lse_spec = pl.BlockSpec(
        (None, None, None, 1, heads * block_q), lambda b, g, i, *_: (b, g, i, 0, 0)
    )
    out = jax.ShapeDtypeStruct((batch, groups, blocks, 1, heads * block_q), jnp.float32)
    scalars = [indices, whole, total, q_offset]
    return pl.pallas_call(
        lambda *refs: _kernel(*refs, softmax=softmax, list_at=list_at, width=width),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, groups, blocks, width),
            in_specs=[q_spec, kv_spec, kv_spec],
            out_specs=(q_spec, lse_spec),
            scratch_shapes=softmax.scratch(),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        name="block_sparse_attention_blocks",
        interpret=interpret,
    )(*(x.reshape(-1) for x in scalars), q, k, v)
