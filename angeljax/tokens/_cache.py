"""Fewer slots of a cache that was filled before tokens were pruned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def check_cache(cache: Any, lead: tuple[int, ...], policy: str) -> None:
    """Refuses a cache that cannot be pruned.

    Raises:
      ValueError: one line that says why.
    """
    if policy == "compact":
        raise ValueError(
            "Prompt.cache holds keys that were rotated to the old positions: use "
            'position_policy="keep", or prune before the model reads the prompt'
        )
    if cache.pages is not None:
        raise ValueError(
            "Prompt.cache has pages, which hold bounds of the pruned keys as well: use "
            "a model without sparse decoding for this prefill"
        )
    *batch, length = lead
    shape = cache.positions.shape
    if tuple(batch) != shape[:-1] or shape[-1] < length:
        raise ValueError(
            f"Prompt.cache has positions {shape}, and a prompt of {list(lead)} needs "
            f"{[*batch, f'at least {length}']}"
        )


def prune_cache(cache: Any, slots: jax.Array, length: int) -> Any:
    """Gathers the slots of a cache; empty ones behind the prompt stay.

    Args:
      cache: an `angeljax.models.KVCache`, a prompt of `length` tokens in its first
        slots; with or without the batch axis.
      slots: int32 `[B, L']` or `[L']`, from `apply_selection`; `length` is no token.
      length: L.

    Returns:
      The same cache with `length - L'` slots fewer.
    """
    total = cache.positions.shape[-1]
    rest = jnp.arange(length, total, dtype=jnp.int32)
    rest = jnp.broadcast_to(rest, (*slots.shape[:-1], total - length))
    # Slots of no token get an index behind all others, so that they are filled.
    index = jnp.concatenate([jnp.where(slots < length, slots, total), rest], axis=-1)

    def gather(x: jax.Array) -> jax.Array:  # [..., B, H, slots, D]
        at = index[..., None, :, None]
        return jnp.take_along_axis(x, at, axis=-2, mode="fill", fill_value=0)

    def layers(x: Any) -> Any:
        take = gather if isinstance(x, tuple) else jax.vmap(gather)
        # A quantized cache has several arrays; static scales are not of any slot.
        return jax.tree.map(lambda a: take(a) if a.shape[-2] == total else a, x)

    kept = jnp.take_along_axis(
        cache.positions, index, axis=-1, mode="fill", fill_value=-1
    )
    # Slots are in order: what stays is counted anew, and the rotary position of the
    # next token stays what it was.
    there = kept >= 0
    order = jnp.where(there, jnp.cumsum(there, axis=-1, dtype=jnp.int32) - 1, -1)
    after = jnp.max(cache.positions, axis=-1) + 1
    if cache.rope_delta is not None:
        after = after + cache.rope_delta
    return dataclasses.replace(
        cache,
        k=layers(cache.k),
        v=layers(cache.v),
        positions=order,
        length=cache.length - (length - slots.shape[-1]),
        rope_delta=after - jnp.sum(there, axis=-1, dtype=jnp.int32),
    )
