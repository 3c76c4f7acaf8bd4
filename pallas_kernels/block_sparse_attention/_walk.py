"""The walk over lists that the forward pass in XLA and the backward pass share.

Queries and keys become tables with a row for each block, `(block, batch, head)` from
slow to fast, so that neighbouring rows have lists of like lengths. A *step* takes the
lists of a few query blocks at once, and visits a few entries of each at a time, as
often as the longest of them needs. Where lists belong to key heads, all query heads of
a key head are one block: their keys are gathered once.

Memory beside the tables is that of one visit, however long the sequence is: `_FAST`
bytes for each core of a CPU, `_LARGE` on an accelerator, or what a visit of one query
block takes if that is more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._devices import current_device
from pallas_kernels.block_sparse_attention._lists import BlockLists

# A visit should stay in the cache of a core, or fill an accelerator. On two cores of a
# CPU, visits of 2 MiB were two to five times as fast as visits of 32 MiB.
_FAST, _LARGE = 1 << 20, 1 << 29
# Keys of one query block in a visit; more make the sums of a visit rarer.
_FAST_KEYS, _LARGE_KEYS = 256, 1024
# Stands for the position of a key that no query sees.
_NEVER = 2**30

Table = jax.Array


def list_heads(q: Any, k: Any, lists: BlockLists) -> int:
    """Heads of the table of queries: those of the lists, but at least the key heads."""
    return q.shape[2] if lists.indices.shape[1] == q.shape[2] else k.shape[2]


def blocks(x: jax.Array, heads: int, size: int) -> Table:
    """`[B, L, H, D]` as `[blocks * B * heads, H // heads * size, D]`; zeros at the end.

    A row holds the positions of its first head, then those of the next.
    """
    batch, length, all_heads, dim = x.shape
    n = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, n * size - length), (0, 0), (0, 0)))
    x = x.reshape(batch, n, size, heads, all_heads // heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(n * batch * heads, -1, dim)


def unblock(table: Table, shape: tuple[int, ...], heads: int, size: int) -> jax.Array:
    """The inverse of `blocks`: an array of this shape."""
    batch, length, all_heads, dim = shape
    x = table.reshape(-1, batch, heads, all_heads // heads, size, dim)
    x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, all_heads, dim)
    return x[:, :length]


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """A product for each entry of axis 0, summed in float32."""
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def logits(
    q: jax.Array, k: jax.Array, seen: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | float]:
    """float32 logits of `q [C, R, D]` on `k [C, K, D]`, and the slope of the cap.

    A key that is not seen gets -inf.
    """
    s = dot(q, k, 2, 2) * scale
    slope: jax.Array | float = 1.0
    if soft_cap is not None:
        capped = jnp.tanh(s / soft_cap)
        s, slope = soft_cap * capped, 1.0 - capped * capped
    return jnp.where(seen, s, -jnp.inf), slope


def walk(
    rows: tuple[Table, ...],
    keys: tuple[Table, Table],
    lists: BlockLists,
    q_offset: jax.Array,
    kv_heads: int,
    start: Callable[..., Any],
    visit: Callable[..., Any],
    finish: Callable[[Any], Any],
    total: Any = (),
) -> tuple[Any, Any]:
    """Visits every listed key block of every query block.

    Args:
      rows: tables of the queries `[N, R, ...]`, that of q first.
      keys: the tables of k and v.
      lists: with B or 1 rows and any heads.
      q_offset: int32 `[B]`.
      kv_heads: of the keys.
      start: `rows of a step -> state`.
      visit: `(state, total, rows, k [C, K, D], v, seen [C, R, K], blocks [C, U])
        -> (state, total)`; `blocks` are rows of the tables of keys, or past their end
        where a list has none.
      finish: `state -> results [C, ...]` of the query blocks of a step.
      total: a state that goes from step to step.

    Returns:
      The results as tables, and the last total.
    """
    size_q, size_k = lists.block_q, lists.block_k
    batch, (count, rows_each, dim) = q_offset.shape[0], rows[0].shape
    n = lists.counts.shape[2]
    heads = count // (n * batch)
    per_step, slots = _sizes(rows_each, size_k, dim, rows[0].dtype.itemsize, lists)
    steps = -(-count // min(per_step, count))
    per_step = -(-count // steps)

    def by_row(x: jax.Array) -> jax.Array:  # [B or 1, heads or 1, n, ...]
        x = jnp.broadcast_to(x, (batch, heads, n, *x.shape[3:]))
        return jnp.moveaxis(x, 2, 0).reshape(count, *x.shape[3:])

    # In the table of keys, block j of a batch row and head is `pair + j * all pairs`.
    head = jnp.arange(heads) // (heads // kv_heads)
    pair = jnp.arange(batch)[:, None] * kv_heads + head
    pair = by_row(jnp.broadcast_to(pair[..., None], (batch, heads, n)))
    first = q_offset[:, None] + jnp.arange(n) * size_q
    first = by_row(jnp.broadcast_to(first[:, None], (batch, heads, n)))
    indices = by_row(lists.indices)
    indices = jnp.pad(indices, ((0, 0), (0, -lists.width % slots)))
    within = jnp.tile(jnp.arange(size_q), rows_each // size_q)

    def step(total: Any, given: Any) -> Any:
        rows, indices, counts, pair, first = given
        position = (first[:, None] + within)[..., None]

        def some(i: jax.Array, states: Any) -> Any:
            j = lax.dynamic_slice_in_dim(indices, i * slots, slots, 1)
            real = i * slots + jnp.arange(slots) < counts[:, None]
            # What stands behind a list is read as its first block: no others' numbers.
            at = pair[:, None] + jnp.where(real, j, indices[:, :1]) * (batch * kv_heads)
            k, v = (
                jnp.take(x, at, axis=0, mode="clip").reshape(per_step, -1, dim)
                for x in keys
            )
            key = jnp.where(real, j * size_k, _NEVER)[..., None] + jnp.arange(size_k)
            seen = key.reshape(per_step, 1, -1) <= position
            return visit(*states, rows, k, v, seen, jnp.where(real, at, _NEVER))

        state = start(*rows)
        visits = -(-jnp.max(counts) // slots)
        state, total = lax.fori_loop(0, visits, some, (state, total))
        return total, finish(state)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, steps * per_step - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(steps, per_step, *x.shape[1:])

    given = (rows, indices, by_row(lists.counts), pair, first)
    total, results = lax.scan(step, total, jax.tree.map(split, given))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results), total


def _sizes(
    rows: int, size_k: int, dim: int, itemsize: int, lists: BlockLists
) -> tuple[int, int]:
    """Query blocks of a step, and entries of each list in a visit."""
    fast = current_device().platform == "cpu"
    slots = (_FAST_KEYS if fast else _LARGE_KEYS) // size_k
    slots = max(1, min(slots, lists.width))
    limit = _FAST * (os.cpu_count() or 1) if fast else _LARGE
    # Four float32 for each pair of a query and a key; for each key its row of k and v
    # and their gradients.
    each = slots * size_k * (16 * rows + (2 * itemsize + 8) * dim)
    return max(1, limit // each), slots
