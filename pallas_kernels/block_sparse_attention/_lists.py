"""`BlockLists`: which key blocks each query block reads, and ways to make them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """Key blocks for each query block, as ascending lists of a static width.

    Query block i holds the rows `i * block_q` and on of `q`, key block j the rows
    `j * block_k` and on of `k`; the last block of either may be short. A list belongs
    to a query head, to all query heads of one key head, or to all heads.

    Attributes:
      indices: int32 `[B, H, num_q_blocks, width]`, B the batch or 1, H the query heads,
        the key heads or 1. The first `counts` entries of a list ascend without
        repetition; what stands behind them is not read.
      counts: int32 `[B, H, num_q_blocks]`.
      block_q, block_k: rows of a block; static.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import BlockLists
      >>> mask = jnp.asarray([[[[True, False], [True, True]]]])
      >>> lists = BlockLists.from_mask(mask, block_q=64, block_k=64)
      >>> lists.counts.tolist(), lists.indices[0, 0, 1].tolist()
      ([[[1, 2]]], [0, 1])
      >>> bool((lists.to_mask(2) == mask).all())
      True
    """

    indices: jax.Array
    counts: jax.Array
    block_q: int = dataclasses.field(metadata={"static": True})
    block_k: int = dataclasses.field(metadata={"static": True})

    @property
    def width(self) -> int:
        """Most blocks that a list can hold."""
        return self.indices.shape[-1]

    @classmethod
    def from_mask(
        cls, mask: jax.Array, *, block_q: int, block_k: int, width: int | None = None
    ) -> BlockLists:
        """Lists of the True entries of a mask.

        Args:
          mask: bool `[B, H, num_q_blocks, num_k_blocks]`.
          block_q, block_k: rows of a block.
          width: most blocks of one list, default all; blocks after the first `width`
            of a row are dropped.

        Returns:
          The lists. Entries behind `counts` repeat the last one.
        """
        blocks = mask.shape[-1]
        width = blocks if width is None else min(width, blocks)
        place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
        counts = jnp.minimum(place[..., -1], width)
        # Slot s holds the first block with s + 1 selected ones up to it. A search in
        # each row: no sort, and no scatter, which a GPU does one element at a time.
        wanted = jnp.minimum(
            jnp.arange(1, width + 1), jnp.maximum(counts, 1)[..., None]
        )
        flat = place.reshape(-1, blocks), wanted.reshape(-1, width)
        found = jax.vmap(lambda p, w: jnp.searchsorted(p, w, method="scan_unrolled"))(
            *flat
        )
        indices = jnp.minimum(found, blocks - 1).astype(jnp.int32)
        return cls(indices.reshape(wanted.shape), counts, block_q, block_k)

    def to_mask(self, num_k_blocks: int) -> jax.Array:
        """The lists as a mask.

        Args:
          num_k_blocks: of the keys.

        Returns:
          bool `[B, H, num_q_blocks, num_k_blocks]`.
        """
        real = jnp.arange(self.width) < self.counts[..., None]
        # What stands behind a list goes to a column that is cut off.
        columns = jnp.where(real, self.indices, num_k_blocks)
        flat = columns.reshape(-1, self.width)
        rows = jnp.arange(flat.shape[0])[:, None]
        mask = jnp.zeros((flat.shape[0], num_k_blocks + 1), bool)
        mask = mask.at[rows, flat].set(True, mode="drop")[:, :-1]
        return mask.reshape(*self.counts.shape, num_k_blocks)


def causal_lists(
    q_length: int,
    k_length: int,
    *,
    block_q: int = 128,
    block_k: int = 128,
    q_offset: int = 0,
) -> BlockLists:
    """Lists with every block that a query may see: attention without sparsity.

    Args:
      q_length, k_length: rows of q and k.
      block_q, block_k: rows of a block.
      q_offset: position of the first query among the keys.

    Returns:
      Lists of shape `[1, 1, num_q_blocks, num_k_blocks]`.
    """
    first, last = visible_blocks(q_length, k_length, block_q, block_k, q_offset)
    del first
    return BlockLists.from_mask(
        (jnp.arange(-(-k_length // block_k)) <= last[:, None])[None, None],
        block_q=block_q,
        block_k=block_k,
    )


def visible_blocks(
    q_length: int, k_length: int, block_q: int, block_k: int, q_offset: Any
) -> tuple[jax.Array, jax.Array]:
    """For each query block: blocks seen by all of its rows, and the last one seen.

    Returns:
      int32 `[..., num_q_blocks]` each, with the leading axes of `q_offset`: the number
      of leading key blocks that lie before every row whole, and the index of the last
      key block that holds a key some row may see.
    """
    blocks = -(-q_length // block_q)
    start = jnp.arange(blocks, dtype=jnp.int32) * block_q
    start = start + jnp.asarray(q_offset, jnp.int32)[..., None]
    end = jnp.minimum(start + block_q, k_length) - 1
    return (start + 1) // block_k, end // block_k
