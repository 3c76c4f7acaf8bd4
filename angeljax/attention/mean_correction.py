"""`mean_correction`: what a sparse kernel left out, as copies of a mean key."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention._estimate import (
    block_means,
    by_parts,
    in_blocks,
    products,
    rows_of_part,
    whole_blocks,
)
from pallas_kernels import BlockLists


def mean_correction(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    y: jax.Array,
    lse: jax.Array,
    *,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds the key blocks that are not in the lists by their means.

    A block J that a query sees whole but does not read joins its softmax as |J| copies
    of its mean key, each with the mean value (FlashPrefill V2, arXiv 2608.19758): it
    adds |J| exp(q . mean(k_J) scale) to the denominator and that times mean(v_J) to the
    numerator. Exact where keys and values of a block are equal, and never above what
    the block truly weighs, since the exponential is convex (without a soft cap). Serves
    any selector. Softmax statistics are float32; 256 MiB of scores, or those of one
    query block, are held at once, in the backward pass too.

    Args:
      q, k, v, lists, scale, q_offset, soft_cap: as `block_sparse_attention` had them.
      y: `[B, T, H, D]`, what it returned.
      lse: float32 `[B, H, T]`, its second output with `return_lse`. Queries with -inf,
        padding that is, stay as they are.

    Returns:
      y in its dtype and lse in float32, of the same shapes. Differentiable.

    Raises:
      ValueError: shapes that do not go together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.attention import mean_correction
      >>> from pallas_kernels import BlockLists
      >>> q = jnp.ones((1, 4, 1, 8))
      >>> v = jnp.arange(4.0).reshape(1, 4, 1, 1) + jnp.zeros((1, 4, 1, 8))
      >>> own = jnp.eye(2, dtype=bool)[None, None]
      >>> lists = BlockLists.from_mask(own, block_q=2, block_k=2)
      >>> y = jnp.asarray([0, 0.5, 2, 2.5]).reshape(1, 4, 1, 1) + 0 * v
      >>> lse = jnp.log(jnp.asarray([[[1.0, 2, 1, 2]]])) + 8**0.5
      >>> y, lse = jax.jit(mean_correction)(q, q, v, lists, y, lse)
      >>> y[0, :, 0, 0].round(4).tolist()  # all keys weigh the same: a running mean
      [0.0, 0.5, 1.0, 1.5]
    """
    batch, t, heads, dim = q.shape
    size, kv_heads = k.shape[1:3]
    if y.shape != q.shape or lse.shape != (batch, heads, t):
        raise ValueError(
            f"y must be {list(q.shape)} as q and lse {[batch, heads, t]}, not "
            f"{list(y.shape)} and {list(lse.shape)}"
        )
    rows, block = lists.block_q, lists.block_k
    if lists.counts.shape[2] != -(-t // rows) or heads % lists.counts.shape[1]:
        raise ValueError(
            f"lists are for {lists.counts.shape[1]} heads and {lists.counts.shape[2]} "
            f"query blocks of {rows} rows: q has {heads} heads and {t} rows"
        )
    scale = dim**-0.5 if scale is None else scale
    num_k = -(-size // block)
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))
    # Keys past the last query are not there yet; their means would spoil the sum.
    there = jnp.arange(size) < (offset + t)[:, None]
    count = in_blocks(there, block).sum(2)
    mean_k, mean_v = (
        block_means(jnp.where(there[..., None, None], x, 0), block, count).astype(
            x.dtype
        )
        for x in (k, v)
    )
    counted = np.minimum((np.arange(num_k) + 1) * block, size)  # one past the last key
    copies = np.log(counted - np.arange(num_k) * block).astype(np.float32)
    left = ~lists.to_mask(num_k)
    left = jnp.repeat(left, heads // left.shape[1], axis=1).swapaxes(1, 2)
    lse = lse.swapaxes(1, 2)
    wide = [whole_blocks(x, rows) for x in (q, y, lse)]

    # Weights are computed again for the gradient, so that they are never all there.
    @functools.partial(jax.checkpoint, static_argnums=1)
    def part(first: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        q, y, lse = (rows_of_part(x, first, size, rows) for x in wide)
        q, y = (x.reshape(batch, size, rows, kv_heads, -1, dim) for x in (q, y))
        s = products("birngd,bjnd->birngj", q, mean_k) * scale
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        block_of = first + jnp.arange(size)[:, None]
        position = offset[:, None, None] + block_of * rows + jnp.arange(rows)
        seen = (counted <= position[..., None] + 1)[:, :, :, None, None]
        unread = rows_of_part(left, first, size)
        unread = unread.reshape(*unread.shape[:3], kv_heads, -1, num_k)
        # A query without keys stays without; the guard keeps its gradient finite.
        lse = lse.reshape(s.shape[:-1])
        some = jnp.isfinite(lse)
        base = jnp.where(some, lse, 0)
        s = jnp.where(unread & seen & some[..., None], s + copies, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.maximum(base, s.max(-1)))
        own, p = jnp.exp(base - top), jnp.exp(s - top[..., None])
        total = own + p.sum(-1)
        added = products("birngj,bjnd->birngd", p.astype(v.dtype), mean_v)
        new = (y.astype(jnp.float32) * own[..., None] + added) / total[..., None]
        lse = jnp.where(some, top + jnp.log(total), lse)
        return new.astype(y.dtype).swapaxes(0, 1), lse.swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1)
        return x.reshape(batch, -1, heads, *x.shape[5:])[:, :t]

    bytes_of_one = 4 * batch * heads * rows * num_k
    y, lse = map(join, by_parts(part, left.shape[1], bytes_of_one))
    return y, lse.swapaxes(1, 2)
