"""How far into its list each tile of queries must read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention._lists import BlockLists, visible_blocks


def steps(
    lists: BlockLists,
    q_length: int,
    k_length: int,
    q_offset: jax.Array,
    *,
    rows: int,
    keys: int,
) -> tuple[jax.Array, jax.Array]:
    """Steps of `keys` keys along a list: those that need no mask, and all.

    A step is a part of a listed block, in the order of the list. As lists ascend, the
    steps that all rows of a tile see whole come first, and those that no row sees last.

    Args:
      lists: with B or 1 rows and any number of heads.
      q_length, k_length: rows of q and k.
      q_offset: int32 [B].
      rows: queries of a tile; divides `block_q`.
      keys: of a step; divides `block_k`.

    Returns:
      `whole` and `total`, int32 [B, heads, num_q_blocks * block_q / rows].
    """
    per_list, per_block = lists.block_q // rows, lists.block_k // keys
    tiles = lists.counts.shape[2] * per_list
    first, last = visible_blocks(q_length, k_length, rows, keys, q_offset)
    # The last query block may hold fewer tiles than others: they see what they like.
    first, last = (
        jnp.pad(x, ((0, 0), (0, tiles - x.shape[1]))) for x in (first, last + 1)
    )
    first = jnp.minimum(first, k_length // keys)
    start = jnp.repeat(lists.indices, per_list, axis=2) * per_block
    count = jnp.repeat(lists.counts, per_list, axis=2)[..., None]
    real = jnp.arange(lists.width, dtype=jnp.int32) < count

    def upto(bound: jax.Array) -> jax.Array:
        seen = jnp.clip(bound[:, None, :, None] - start, 0, per_block)
        return jnp.sum(jnp.where(real, seen, 0), axis=-1, dtype=jnp.int32)

    return upto(first), upto(last)
