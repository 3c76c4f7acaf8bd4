"""`KeyPages`: what Quest keeps of the keys of each page of a cache; see `quest`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention._estimate import products

LAYOUTS = ("heads_first", "slots_first")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyPages:
    """Bounds of the keys of each page of a cache; a pytree of static shapes.

    Attributes:
      low, high: `[B, Hkv, pages, D]`, or `[layers, B, Hkv, pages, D]`, dtype of the
        cache. A page without keys has the greatest number in `low` and the lowest in
        `high`.
      page_size: slots of a page; static.
    """

    low: jax.Array
    high: jax.Array
    page_size: int = dataclasses.field(metadata={"static": True})


def init_pages(k: Any, *, page_size: int = 16, layout: str = "heads_first") -> KeyPages:
    """Pages of an empty cache.

    Args:
      k: the keys' store or its shape and dtype: `[B, Hkv, slots, D]`, or `[B, slots,
        Hkv, D]` with the layout "slots_first"; a leading axis of layers may stand
        before. `page_size` must divide the slots.
      page_size: slots of a page.
      layout: "heads_first", as `angeljax.models.KVCache` has it, or "slots_first".

    Returns:
      The pages.

    Raises:
      ValueError: an unknown layout, or slots that are no whole pages.
    """
    *lead, slots, dim = heads_first_shape(k.shape, layout)
    if type(page_size) is not int or page_size < 1 or slots % page_size:
        raise ValueError(
            f"page_size={page_size!r} must divide the {slots} slots of the cache"
        )
    shape = *lead, slots // page_size, dim
    most = jnp.finfo(k.dtype).max
    low, high = jnp.full(shape, most, k.dtype), jnp.full(shape, -most, k.dtype)
    return KeyPages(low=low, high=high, page_size=page_size)


def update_pages(
    pages: KeyPages,
    k: jax.Array,
    slot: int | jax.Array,
    *,
    valid: jax.Array | None = None,
    layer: int | jax.Array | None = None,
) -> KeyPages:
    """Takes in the keys of new tokens: a whole prompt, a chunk or one token.

    Touches only their pages, so that a donated or carried state is updated in place. A
    slot that is written again widens its page: the bounds stay bounds.

    Args:
      pages: the state.
      k: `[B, T, Hkv, D]`, as they are written to the cache.
      slot: of the first of them; T slots from there must be in the cache.
      valid: bool `[B, T]`, False for padding; None if there is none.
      layer: which layer, if the state holds all of them.

    Returns:
      The new state.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.attention import init_pages, update_pages
      >>> k = jnp.arange(6.0).reshape(1, 6, 1, 1)
      >>> pages = init_pages(jnp.zeros((1, 1, 8, 1)), page_size=4)
      >>> pages = update_pages(pages, k, 0)
      >>> pages.low.ravel().tolist(), pages.high.ravel().tolist()
      ([0.0, 4.0], [3.0, 5.0])
    """
    if (layer is None) != (pages.low.ndim == 4):
        raise ValueError(
            f"layer={layer!r} for pages of {list(pages.low.shape)}: name the layer if "
            "and only if there is an axis of layers"
        )
    *_, batch, heads, count, dim = pages.low.shape
    t, size = k.shape[1], pages.page_size
    if k.shape != (batch, t, heads, dim) or t > count * size:
        raise ValueError(
            f"k is {list(k.shape)}: use [{batch}, T, {heads}, {dim}] with at most "
            f"{count * size} rows"
        )
    # As many pages as T tokens may touch, as far from the end as they must be.
    touched = min((t + size - 2) // size + 1, count)
    first = jnp.minimum(jnp.asarray(slot, jnp.int32) // size, count - touched)
    inside = slot - first * size
    k = jnp.swapaxes(k, 1, 2).astype(pages.low.dtype)
    real = None if valid is None else valid[:, None, :, None]
    at = (0, 0, first, 0) if layer is None else (layer, 0, 0, first, 0)

    def merge(store: jax.Array, fill: Any, least: bool) -> jax.Array:
        new = k if real is None else jnp.where(real, k, fill)
        room = jnp.full((batch, heads, touched * size, dim), fill, k.dtype)
        room = jax.lax.dynamic_update_slice(room, new, (0, 0, inside, 0))
        room = room.reshape(batch, heads, touched, size, dim)
        new = room.min(3) if least else room.max(3)
        new = new if layer is None else new[None]
        old = jax.lax.dynamic_slice(store, at, new.shape)
        new = jnp.minimum(old, new) if least else jnp.maximum(old, new)
        return jax.lax.dynamic_update_slice(store, new, at)

    most = jnp.finfo(k.dtype).max
    return KeyPages(
        low=merge(pages.low, most, True),
        high=merge(pages.high, -most, False),
        page_size=size,
    )


def page_bounds(
    q: jax.Array, pages: KeyPages, *, layer: int | jax.Array | None = None
) -> jax.Array:
    """float32 `[B, Hkv, G, pages]`: at least q . k for each key of a page.

    Args:
      q: `[B, 1, H, D]`.
      pages: the state.
      layer: which layer, if the state holds all of them.

    Returns:
      The bounds, before any scale; -inf for pages without keys.
    """
    low, high = pages.low, pages.high
    if layer is not None:
        low, high = (
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (low, high)
        )
    q = q.reshape(q.shape[0], low.shape[1], -1, q.shape[-1])

    def dot(q: jax.Array, side: jax.Array) -> jax.Array:
        return products("bngd,bnpd->bngp", q, side.astype(q.dtype))

    bound = dot(jnp.maximum(q, 0), high) + dot(jnp.minimum(q, 0), low)
    some = low[..., 0] <= high[..., 0]
    return jnp.where(some[:, :, None], bound, -jnp.inf)


def heads_first_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """`(layers?, B, Hkv, slots, D)`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: use {' or '.join(map(repr, LAYOUTS))}")
    if len(shape) not in (4, 5):
        raise ValueError(
            f"a cache has four axes, or five with layers, not {list(shape)}"
        )
    if layout == "slots_first":
        *lead, slots, heads, dim = shape
        return *lead, heads, slots, dim
    return tuple(shape)
