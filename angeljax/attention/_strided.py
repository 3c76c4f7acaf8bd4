"""Strided scores, a few query blocks at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from angeljax.attention._frame import Frame, strided

# Most bytes of scores that are alive at once, or those of one query block if more.
_BYTES = 2**28
# Parts of the prompt, each scored up to its own last block only, and how many query
# blocks are worth one.
_PARTS, _WORTH = 4, 32


class Scores(NamedTuple):
    """Scores of the cells of some query blocks.

    Attributes:
      values: float32 `[B, H, n, cells, blocks, cells]`, of the cells of n query blocks
        for those of all key blocks; -inf past the diagonal.
      real: bool `[1 or B, 1, n, cells, 1]`, which query cells hold a real query.
    """

    values: jax.Array
    real: jax.Array


def mass(scores: Scores) -> jax.Array:
    """Softmax over the keys, summed over the cells of the two blocks.

    Returns:
      float32 `[B, H, n, blocks]`; 0 past the diagonal.
    """
    top = jnp.max(scores.values, (-2, -1), keepdims=True)
    e = jnp.sum(jnp.exp(scores.values - top), -1)  # 0 past the diagonal
    e = lax.optimization_barrier(e)  # Else the scores are read again for the sum.
    e = e / jnp.sum(e, -1, keepdims=True)
    return jnp.sum(jnp.where(scores.real, e, 0), 3)


def measured(
    frame: Frame,
    q: jax.Array,
    k: jax.Array,
    stride: int,
    measure: Callable[[Scores], Any],
    pool: int = 1,
) -> Iterator[tuple[slice, Any]]:
    """What a method measures on the strided scores of all queries.

    A cell is `stride` rows. The score of a query cell a and a key cell c is the sum of
    the anti-diagonal products of their rows over `stride * sqrt(D)`,

        A[a, c] = sum_t q[a stride + stride - 1 - t] k[c stride + t].

    With `pool` that many neighbouring cells are one, and its score is the mean of
    theirs: as cheap as a product of mean rows.

    Query blocks are scored a chunk after the other (`lax.map`): 256 MiB of scores at
    once, or those of one query block if that is more.

    Args:
      frame: of the call.
      q, k: as the selector has them.
      stride: rows of a cell; divides the block size.
      measure: from scores to arrays `[B, H, n, blocks]`.
      pool: cells of `stride` rows that are one; divides those of a block.

    Yields:
      Query blocks, and what was measured for them: arrays `[B, H, query blocks, key
      blocks]`, of the key blocks that they may see.
    """
    batch, size = q.shape[0], stride * pool
    cells = frame.block // size

    def pooled(x: jax.Array) -> jax.Array:
        """`[B, n, cells, stride, ...]`."""
        x = strided(x, frame.block, stride)
        if pool == 1:
            return x
        x = x.reshape(*x.shape[:2], cells, pool, *x.shape[3:])
        return x.mean(3, dtype=jnp.float32).astype(x.dtype)

    q = pooled(frame.real_queries(q))
    q = q.reshape(*q.shape[:4], frame.kv_heads, frame.group, q.shape[-1])
    k = pooled(frame.real_keys(k))[:, :, :, ::-1]
    k = k.transpose(0, 4, 1, 2, 3, 5)
    k = k.reshape(*k.shape[:4], -1)  # [B, Hkv, num_k, cells, stride * D]
    keys = jnp.reshape(jnp.asarray(frame.keys), (-1, 1, 1, 1, 1))
    all_rows = jnp.asarray(frame.rows)[:, None, :, None]

    def chunk(k: jax.Array, first: Any, n: int) -> Any:
        part = lax.dynamic_slice_in_dim(q, first, n, 1)
        part = part.transpose(0, 4, 5, 1, 2, 3, 6)
        part = part.reshape(*part.shape[:5], -1)  # [B, Hkv, G, n, cells, stride * D]
        values = jnp.einsum(
            "bhgnax,bhmcx->bhgnamc",
            part,
            k,
            precision="highest" if q.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        values = values.reshape(batch, frame.heads, *values.shape[3:])
        values = values * (1 / (stride * math.sqrt(q.shape[-1])))
        rows = lax.dynamic_slice_in_dim(all_rows, first, n, 2)
        cell = rows[..., None] * cells + jnp.arange(cells)[:, None]
        columns = np.arange(k.shape[2] * cells).reshape(-1, cells)
        values = jnp.where(columns <= cell[..., None], values, -jnp.inf)
        return measure(Scores(values, cell * size < keys))

    each = 4 * batch * frame.heads * cells * frame.num_k * cells
    count = max(1, _BYTES // each)
    for part, seen in frame.parts(max(1, min(_PARTS, frame.num_q // _WORTH))):
        # Whole chunks, and what is left.
        whole, rest = divmod(part.stop - part.start, count)
        found, past = [], k[:, :, :seen]
        if whole:
            starts = part.start + jnp.arange(whole) * count
            every = lax.map(lambda first, k=past: chunk(k, first, count), starts)
            found.append(jax.tree.map(_joined, every))
        if rest:
            found.append(chunk(past, part.stop - rest, rest))
        yield part, jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *found)


def _joined(x: jax.Array) -> jax.Array:
    """`[B, H, query blocks, ...]` of `[chunks, B, H, n, ...]`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
