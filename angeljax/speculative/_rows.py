"""Reading and writing rows that stand at different places; masks over a row cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_row(fn: Callable[..., Any], array: jax.Array, *rows: Any, axis: int) -> Any:
    """`fn(row, ...)` for each row of `array` along `axis`; `rows` are `[B, ...]`.

    One row alone is not vmapped: a slice at a traced place then stays a slice and does
    not become a gather, or a scatter that copies.
    """
    if array.shape[axis] == 1:
        one = fn(jnp.squeeze(array, axis), *(r[0] for r in rows))
        return jnp.expand_dims(one, axis)
    return jax.vmap(fn, (axis, *(0 for _ in rows)), axis)(array, *rows)


def put_rows(array: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """`array` `[B, S]` with `new` `[B, T]` written from `starts` `[B]` on."""

    def put(row: jax.Array, start: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (start,))

    return by_row(put, array, starts, new, axis=0)


def move_rows(cache: Any, starts: jax.Array, path: jax.Array, nodes: int) -> Any:
    """Puts the slots `starts + path` of each row at `starts` and on.

    Args:
      cache: pytree of arrays `[..., B, heads, slots, features]`.
      starts: int32 `[B]`.
      path: int32 `[B, R]`, from 0 to `nodes - 1`.
      nodes: how many slots from `starts` on are looked at.
    """

    def move(row: jax.Array, start: jax.Array, path: jax.Array) -> jax.Array:
        axis = row.ndim - 2
        window = jax.lax.dynamic_slice_in_dim(row, start, nodes, axis)
        window = jnp.take(window, path, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(row, window, start, axis)

    return jax.tree.map(lambda x: by_row(move, x, starts, path, axis=x.ndim - 4), cache)


def chain_mask(positions: jax.Array, slots: int) -> jax.Array:
    """What tokens at `positions` `[B, T]` see where slot and position are the same.

    Returns:
      bool `[B, 1, T, slots]`.
    """
    return (jnp.arange(slots) <= positions[..., None])[:, None]


def tree_mask(ancestors: jax.Array, starts: jax.Array, slots: int) -> jax.Array:
    """What the nodes of a tree see: all slots before the root's, and their ancestors.

    Args:
      ancestors: bool `[B, T, N]`, or `[1, T, N]`: of T nodes, those of N that each
        sees, itself included.
      starts: int32 `[B]`, slot of the root; node j has slot `starts + j`.
      slots: of the cache, `starts + N` or more.

    Returns:
      bool `[B, 1, T, slots]`.
    """
    batch, (_, count, _) = len(starts), ancestors.shape
    before = jnp.arange(slots) < starts[:, None, None]
    before = jnp.broadcast_to(before, (batch, count, slots))
    given = jnp.broadcast_to(ancestors, (batch, *ancestors.shape[1:]))

    def put(row: jax.Array, start: jax.Array, given: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row, given, (0, start))

    return by_row(put, before, starts, given, axis=0)[:, None]


def cache_slots(cache: Any) -> int:
    """How many tokens a row of a cache can hold."""
    return jax.tree.leaves(cache)[0].shape[-2]
