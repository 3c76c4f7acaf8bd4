"""Reading and writing rows that stand at different places; masks over a row cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def put_rows(array: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """`array` `[B, ..., S]` with `new` `[B, ..., T]` written from `starts` `[B]` on."""

    def put(row: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        at: Any = (*(0 for _ in row.shape[1:]), start)
        return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), at)

    if len(starts) == 1:
        return put(array[0], new[0], starts[0])[None]
    return jax.vmap(put)(array, new, starts)


def move_rows(cache: Any, starts: jax.Array, path: jax.Array, nodes: int) -> Any:
    """Puts the slots `starts + path` of each row at `starts` and on.

    Args:
      cache: pytree of arrays `[..., B, heads, slots, features]`; others stay.
      starts: int32 `[B]`.
      path: int32 `[B, R]`, from 0 to `nodes - 1`.
      nodes: how many slots from `starts` on are looked at.
    """

    if len(starts) > 1:
        # As below, but mapped over the rows that would copy a stack of layers whole.
        row, start = jnp.arange(len(starts))[:, None], starts[:, None]
        source = (..., row, slice(None), start + path, slice(None))
        goal = (..., row, slice(None), start + jnp.arange(path.shape[1]), slice(None))
        return map_slots(
            lambda x: x.at[goal].set(
                x.at[source].get(mode="promise_in_bounds"),
                mode="promise_in_bounds",
                unique_indices=True,
            ),
            cache,
        )

    def move(x: jax.Array) -> jax.Array:
        axis = x.ndim - 2
        window = jax.lax.dynamic_slice_in_dim(x, starts[0], nodes, axis)
        window = jnp.take(window, path[0], axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(x, window, starts[0], axis)

    return map_slots(move, cache)


def map_slots(change: Callable[[jax.Array], jax.Array], cache: Any) -> Any:
    """A cache with its arrays of slots changed; others tell of rows, and stay.

    Args:
      change: of arrays `[..., B, heads, slots, features]`.
      cache: pytree of such arrays, and of some with fewer axes.
    """
    return jax.tree.map(lambda x: change(x) if x.ndim >= 4 else x, cache)


def chain_mask(positions: jax.Array, slots: int) -> jax.Array:
    """What tokens see where slot and position are the same: all up to their own.

    Args:
      positions: int32 `[B, T]`.
      slots: of the cache.

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
    count = ancestors.shape[-1]
    node = jnp.arange(slots) - starts[:, None, None]  # [B, 1, slots]
    given = jnp.broadcast_to(ancestors, (len(starts), *ancestors.shape[1:]))
    at = jnp.clip(node, 0, count - 1)
    given = jnp.take_along_axis(given, at, axis=-1, mode="promise_in_bounds")
    return ((node < 0) | (given & (node < count)))[:, None]


def key_positions(positions: jax.Array, starts: jax.Array, slots: int) -> jax.Array:
    """Positions of the slots of a cache, for layers with a sliding window.

    Args:
      positions: int32 `[B, N]`, of slots `starts` and on, which hold a tree.
      starts: int32 `[B]`.
      slots: of the cache.

    Returns:
      int32 `[B, slots]`; before `starts` the number of the slot.
    """
    plain = jnp.broadcast_to(jnp.arange(slots), (len(starts), slots))
    return put_rows(plain, positions, starts)


def cache_slots(cache: Any) -> int:
    """How many tokens a row of a cache can hold.

    Args:
      cache: pytree of arrays `[..., B, heads, slots, features]`, and of others.

    Returns:
      A Python integer.
    """
    return next(x for x in jax.tree.leaves(cache) if x.ndim >= 4).shape[-2]
