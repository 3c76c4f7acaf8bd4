"""Where the blocks of a call stand, and what the last queries attend to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from angeljax.attention._selector import Place

# Most bytes of float32 scores that a selector holds at once beside its result.
CHUNK_BYTES = 2**28


class Grid(NamedTuple):
    """The query and key blocks of one call.

    Attributes:
      block: rows of a block.
      start: int32 `[B]`, position of the first query.
      end: int32 `[B]`, one past the last real query; keys from there on are not real.
      own: int32 `[B, n_q]`, the key block of each query block.
      num_k: key blocks.
    """

    block: int
    start: jax.Array
    end: jax.Array
    own: jax.Array
    num_k: int

    @property
    def num_q(self) -> int:
        return self.own.shape[1]

    @property
    def distance(self) -> jax.Array:
        """int32 `[B, 1, n_q, n_k]`: blocks between a query block and a key block."""
        return self.own[:, None, :, None] - jnp.arange(self.num_k)

    @property
    def last(self) -> jax.Array:
        """int32 `[B]`: the last block that holds a real key."""
        return jnp.maximum(self.end - 1, 0) // self.block


def make_grid(q: jax.Array, k: jax.Array, place: Place, block: int) -> Grid:
    """The grid of a call.

    Raises:
      ValueError: arrays or a place that do not go together.
    """
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, D], not {list(x.shape)}")
    batch, t = q.shape[:2]
    if k.shape[0] != batch or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k {list(k.shape)} does not fit q {list(q.shape)}: it must have its batch "
            "and head size, and a number of heads that divides its"
        )
    offset = place.q_offset
    if isinstance(offset, int) and (
        offset % block or not 0 <= offset <= k.shape[1] - t
    ):
        raise ValueError(
            f"q_offset={offset}: use a multiple of the block size {block} that is at "
            f"most {k.shape[1] - t}, the rows of k that {t} queries leave"
        )
    start = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
    end = start + t
    if place.lengths is not None:
        end = jnp.minimum(end, jnp.asarray(place.lengths, jnp.int32))
    num_k = -(-k.shape[1] // block)
    own = start[:, None] // block + jnp.arange(-(-t // block), dtype=jnp.int32)
    return Grid(block, start, end, jnp.minimum(own, num_k - 1), num_k)


def in_blocks(x: jax.Array, block: int) -> jax.Array:
    """`[B, n, block, ...]` of `[B, rows, ...]`, zeros behind the last row."""
    blocks = -(-x.shape[1] // block)
    pad = [(0, 0)] * x.ndim
    pad[1] = 0, blocks * block - x.shape[1]
    return jnp.pad(x, pad).reshape(x.shape[0], blocks, block, *x.shape[2:])


def split_last(x: jax.Array, block: int) -> jax.Array:
    """`[..., n, block]` of `[..., rows]`, zeros behind the last row."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    return jnp.pad(x, pad).reshape(*x.shape[:-1], -1, block)


def along(x: jax.Array, distance: jax.Array) -> jax.Array:
    """`[B, H, n_q, n_k]`: entry `distance [B, 1, n_q, n_k]` of `x [B, H, n_k]`.

    Distances below 0 give the first entry.
    """
    shape = *x.shape[:2], *distance.shape[2:]
    back = jnp.broadcast_to(jnp.maximum(distance, 0), shape)
    return jnp.take_along_axis(x, back.reshape(*shape[:2], -1), -1).reshape(shape)


def block_means(x: jax.Array, rows: jax.Array, block: int) -> jax.Array:
    """float32 `[B, n, heads, D]`: mean of the real rows of each block, 0 for none.

    Args:
      x: `[B, rows, heads, D]`; what stands behind the real rows may be anything.
      rows: int32 `[B]`, real ones.
      block: rows of a block.
    """
    real = jnp.arange(x.shape[1]) < rows[:, None]
    x = jnp.where(real[..., None, None], x.astype(jnp.float32), 0)
    count = in_blocks(real, block).sum(2, dtype=jnp.int32)
    return in_blocks(x, block).sum(2) / jnp.maximum(count, 1)[..., None, None]


def last_queries(q: jax.Array, grid: Grid, count: int) -> tuple[jax.Array, ...]:
    """The last real queries of each row of the batch.

    Args:
      q: `[B, T, H, D]`.
      grid: of the call.
      count: how many.

    Returns:
      `[B, n, H, D]` with n = min(count, T), 0 where there are fewer; their positions,
      int32 `[B, n]`; and which are real, bool `[B, n]`.
    """
    count = min(count, q.shape[1])
    first = jnp.clip(grid.end - grid.start - count, 0, q.shape[1] - count)
    taken = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, count))(q, first)
    position = (grid.start + first)[:, None] + jnp.arange(count)
    real = position < grid.end[:, None]
    return jnp.where(real[..., None, None], taken, 0), position, real


def tail_mass(
    q: jax.Array, k: jax.Array, position: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much the last queries attend to each key and to each distance.

    One key head after the other, so that `4 n S H / Hkv` floats of each row of the
    batch are alive at once.

    Args:
      q, position, real: as `last_queries` gives them; positions are consecutive.
      k: `[B, S, Hkv, D]`.

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
        s = jnp.einsum(
            "bngd,bsd->bgns", q, k,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip
        s = jnp.where(seen, s * dim**-0.5, -jnp.inf)
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
    p = jnp.pad(jnp.flip(p, 2), [(0, 0)] * (p.ndim - 1) + [(0, rows)])
    p = p.reshape(*lead, -1)[..., : rows * (size + rows - 1)]
    sums = p.reshape(*lead, rows, size + rows - 1).sum(2)
    found = jnp.take_along_axis(sums, jnp.maximum(back, 0), -1)
    return jnp.where(back >= 0, found, 0)
