"""Means of blocks, and what the last queries of a prompt attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention._frame import Frame, strided

# Most bytes of float32 scores that are held at once beside the result.
CHUNK_BYTES = 2**28


def products(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` to float32; as exact as the operands are."""
    return jnp.einsum(
        equation,
        a,
        b,
        precision="highest" if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def by_parts(
    part: Callable[[jax.Array, int], Any], count: int, bytes_of_one: int
) -> Any:
    """A function of query blocks, some of them at a time.

    Args:
      part: `(first, size)`, first traced and size static, gives arrays whose leading
        axis is the blocks `first` to `first + size`.
      count: query blocks.
      bytes_of_one: what the function holds for one of them.

    Returns:
      The arrays for all blocks.
    """
    size = max(1, min(CHUNK_BYTES // max(bytes_of_one, 1), count))
    parts = -(-count // size)
    if parts == 1:
        return part(jnp.int32(0), size)
    # The last part begins early where it would not be whole.
    first = jnp.minimum(jnp.arange(parts, dtype=jnp.int32) * size, count - size)
    found = jax.lax.map(lambda first: part(first, size), first)

    def join(x: jax.Array) -> jax.Array:
        whole = x[:-1].reshape(-1, *x.shape[2:])
        return jnp.concatenate([whole, x[-1, parts * size - count :]])

    return jax.tree.map(join, found)


def rows_of_part(x: jax.Array, first: Any, size: int, rows: int = 1) -> jax.Array:
    """`[B, size, rows, ...]`: some blocks of `[B, blocks * rows, ...]`."""
    x = jax.lax.dynamic_slice_in_dim(x, first * rows, size * rows, axis=1)
    return x.reshape(x.shape[0], size, rows, *x.shape[2:])


def whole_blocks(x: jax.Array, block: int) -> jax.Array:
    """`[B, rows, ...]` with zeros up to a multiple of the block."""
    pad = [(0, 0)] * x.ndim
    pad[1] = 0, -x.shape[1] % block
    return jnp.pad(x, pad)


def in_blocks(x: jax.Array, block: int) -> jax.Array:
    """`[B, n, block, ...]` of `[B, rows, ...]`, zeros behind the last row."""
    return strided(x, block, block)[:, :, 0]


def split_last(x: jax.Array, block: int) -> jax.Array:
    """`[..., n, block]` of `[..., rows]`, zeros behind the last row."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    return jnp.pad(x, pad).reshape(*x.shape[:-1], -1, block)


def block_means(x: jax.Array, block: int, rows: jax.Array | None) -> jax.Array:
    """float32 `[B, n, heads, D]`: means over the real rows of each block.

    Args:
      x: `[B, rows, heads, D]`, zeros in rows that are not real.
      block: rows of a block.
      rows: real ones, `[1 or B, n]`; None if all blocks are full.
    """
    total = in_blocks(x, block).sum(2, dtype=jnp.float32)
    return total / (block if rows is None else jnp.maximum(rows, 1)[..., None, None])


def key_means(frame: Frame, k: jax.Array) -> jax.Array:
    """`block_means` of the keys up to the last query."""
    return block_means(k, frame.block, frame.rows_of(frame.num_k, False))


def query_means(frame: Frame, q: jax.Array) -> jax.Array:
    """`block_means` of the queries."""
    q = frame.real_queries(q)
    return block_means(q, frame.block, frame.rows_of(frame.num_q, True))


def distance(frame: Frame) -> Any:
    """int32 `[1 or B, 1, num_q, num_k]`: blocks from a key block to a query block."""
    return jnp.asarray(frame.rows)[:, None, :, None] - np.arange(frame.num_k)


def along(x: jax.Array, distance: jax.Array) -> jax.Array:
    """`[B, H, num_q, num_k]`: of `x [B, H, num_k]`, the entry at each distance.

    Distances below 0 give the first entry.
    """
    shape = *x.shape[:2], *distance.shape[2:]
    back = jnp.broadcast_to(jnp.maximum(distance, 0), (x.shape[0], 1, *shape[2:]))
    return jax.vmap(lambda x, back: x[:, back[0]])(x, back).reshape(shape)


def ends(frame: Frame, batch: int) -> jax.Array:
    """int32 `[B]`: real keys of each row of the batch."""
    return jnp.broadcast_to(jnp.asarray(frame.keys, jnp.int32), (batch,))


def last_queries(
    frame: Frame, q: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last real queries of each row of the batch.

    Args:
      frame: of the call.
      q: `[B, T, H, D]`.
      count: how many.

    Returns:
      `[B, n, H, D]` with n = min(count, T), 0 where there are fewer; their positions,
      int32 `[B, n]`, one after the other; and which are real, bool `[B, n]`.
    """
    batch, t = q.shape[:2]
    count = min(count, t)
    start = jnp.broadcast_to(jnp.asarray(frame.first, jnp.int32), (batch,))
    end = ends(frame, batch)
    first = jnp.clip(end - start - count, 0, t - count)
    taken = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, count))(q, first)
    position = (start + first)[:, None] + jnp.arange(count)
    real = position < end[:, None]
    return jnp.where(real[..., None, None], taken, 0), position, real


def tail_mass(
    q: jax.Array, k: jax.Array, position: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much the last queries attend to each key and to each distance.

    One key head after the other, so that a few times `4 n S H / Hkv` bytes are alive at
    once for each row of the batch.

    Args:
      q, position, real: as `last_queries` gives them.
      k: `[B, S, Hkv, D]`, zeros in rows that are not real.

    Returns:
      float32 `[B, H, S]` twice: the mean over the real queries of the softmax weight on
      key s, and of that on the key s before the query.
    """
    batch, count, heads, dim = q.shape
    size, kv_heads = k.shape[1:3]
    q = q.reshape(batch, count, kv_heads, -1, dim)
    seen = jnp.arange(size) <= position[..., None]
    seen = (seen & real[..., None])[:, None]  # [B, 1, n, S]
    share = 1 / jnp.maximum(real.sum(-1), 1)[:, None, None]
    # Column c of the skewed matrix holds the keys that are `position[-1] - c` back.
    back = position[:, -1:, None] - jnp.arange(size)

    def head(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, k = args
        s = jnp.where(seen, products("bngd,bsd->bgns", q, k) * dim**-0.5, -jnp.inf)
        top = jnp.max(s, -1, keepdims=True)
        p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
        p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
        return p.sum(2) * share, _diagonals(p, back) * share

    mass = jax.lax.map(head, (jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)))
    column, diagonal = (jnp.moveaxis(x, 0, 1).reshape(batch, heads, size) for x in mass)
    return column, diagonal


def _diagonals(p: jax.Array, back: jax.Array) -> jax.Array:
    """Sums of `[B, G, n, S]` over the pairs that are s apart; see `tail_mass`."""
    *lead, rows, size = p.shape
    # Rows written with one column less than they have: each starts one further on.
    p = jnp.pad(jnp.flip(p, -2), [(0, 0)] * (p.ndim - 1) + [(0, rows)])
    p = p.reshape(*lead, -1)[..., : rows * (size + rows - 1)]
    sums = p.reshape(*lead, rows, size + rows - 1).sum(-2)
    back = jnp.broadcast_to(back, (*lead, size))
    found = jnp.take_along_axis(sums, jnp.maximum(back, 0), -1)
    return jnp.where(back >= 0, found, 0)
