"""Quest: a decoded token reads the pages of the cache that may matter to it.

For each page of the cache the least and greatest value of each channel of its keys are
kept. With them, sum_d max(q_d low_d, q_d high_d) is a bound that no product of the
query with a key of the page exceeds; the pages with the highest bounds are read (arXiv
2406.10774, section 3.3). The state is an explicit pytree:

    pages = init_pages(cache_k)                    with the cache
    pages = update_pages(pages, k, slot)           after a prefill, after each token
    y = quest_attention(q, cache_k, cache_v, pages, keep_pages=64, length=slot + 1)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

LAYOUTS = ("heads_first", "slots_first")
PER = ("kv_head", "query_head")


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
    *lead, slots, dim = _heads_first_shape(k.shape, layout)
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
        return jnp.einsum(
            "bngd,bnpd->bngp", q, side.astype(q.dtype),
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip

    bound = dot(jnp.maximum(q, 0), high) + dot(jnp.minimum(q, 0), low)
    some = low[..., 0] <= high[..., 0]
    return jnp.where(some[:, :, None], bound, -jnp.inf)


def select_pages(
    q: jax.Array,
    pages: KeyPages,
    *,
    keep_pages: int,
    length: int | jax.Array,
    per: str = "kv_head",
    layer: int | jax.Array | None = None,
) -> jax.Array:
    """The pages with the highest bounds, and always the one of the newest token.

    Args:
      q: `[B, 1, H, D]`.
      pages: the state.
      keep_pages: how many; static.
      length: slots that are filled, the new token included: an integer or int32 `[B]`.
      per: "query_head" gives each query head pages of its own; "kv_head" one list for
        the query heads of a key head, by how near the best of them comes to its own
        best page. The latter reads each page once.
      layer: which layer, if the state holds all of them.

    Returns:
      int32 `[B, Hkv or H, min(keep_pages, pages)]`, ascending. Where fewer pages have
      keys, the rest of the list is any of the others.
    """
    if type(keep_pages) is not int or keep_pages < 1:
        raise ValueError(f"keep_pages must be a positive integer, not {keep_pages!r}")
    if per not in PER:
        raise ValueError(f"per={per!r}: use {' or '.join(map(repr, PER))}")
    bound = page_bounds(q, pages, layer=layer)
    batch, heads, group, count = bound.shape
    if per == "kv_head":
        best = bound.max(-1, keepdims=True)
        bound = (bound - jnp.where(jnp.isfinite(best), best, 0)).max(2)
    else:
        bound = bound.reshape(batch, heads * group, count)
    newest = (jnp.asarray(length, jnp.int32) - 1) // pages.page_size
    newest = jnp.reshape(newest, (-1, 1, 1)) == jnp.arange(count)
    bound = jnp.where(newest, jnp.inf, bound)
    chosen = jax.lax.top_k(bound, min(keep_pages, count))[1]
    return jnp.sort(chosen, -1)


def quest_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: KeyPages,
    *,
    keep_pages: int,
    length: int | jax.Array,
    valid: jax.Array | None = None,
    per: str = "kv_head",
    layout: str = "heads_first",
    layer: int | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention of one new token on the pages that may matter to it.

    Only these pages are gathered from the cache, with shapes that do not depend on how
    much of it is filled, so that a decode loop compiles once. With `keep_pages` at
    least the pages of the cache it is attention on all of it.

    Args:
      q: `[B, 1, H, D]`.
      k, v: the cache with the new token written: `[B, Hkv, slots, D]`, or `[B, slots,
        Hkv, D]` with the layout "slots_first"; with a leading axis of layers if
        `layer` is given, which then is not sliced out.
      pages: state of these keys, the new one included.
      keep_pages, length, per: as in `select_pages`.
      valid: bool `[B, slots]`, False for padding within the filled slots.
      layout: of k and v.
      layer: which layer, if the cache and the state hold all of them.
      scale: of the logits, default `D ** -0.5`.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.

    Returns:
      `[B, 1, H, D]` in the dtype of q; softmax in float32, zeros where no key is seen.

    Raises:
      ValueError: shapes or options that do not go together.

    Example:
      >>> import jax
      >>> from angeljax.attention import init_pages, quest_attention, update_pages
      >>> k = jax.random.normal(jax.random.key(0), (1, 2, 64, 16))
      >>> q = jax.random.normal(jax.random.key(1), (1, 1, 4, 16))
      >>> pages = update_pages(init_pages(k), k.swapaxes(1, 2), 0)
      >>> quest_attention(q, k, k, pages, keep_pages=2, length=64).shape
      (1, 1, 4, 16)
    """
    *lead, slots, dim = _heads_first_shape(k.shape, layout)
    size, count = pages.page_size, pages.low.shape[-2]
    if k.shape != v.shape or (*lead, count * size, dim) != (
        *pages.low.shape[:-2], slots, pages.low.shape[-1],
    ):  # fmt: skip
        raise ValueError(
            f"k {list(k.shape)}, v {list(v.shape)} and pages {list(pages.low.shape)} "
            f"of {size} slots are not of one cache"
        )
    if (layer is None) != (len(lead) == 2):
        raise ValueError(
            f"layer={layer!r} for a cache of {list(k.shape)}: name the layer if and "
            "only if there is an axis of layers"
        )
    batch, kv_heads = lead[-2:]
    heads = q.shape[2]
    if q.shape != (batch, 1, heads, dim) or heads % kv_heads:
        raise ValueError(
            f"q is {list(q.shape)}: use [{batch}, 1, heads, {dim}] with a multiple of "
            f"{kv_heads} heads"
        )
    chosen = select_pages(
        q, pages, keep_pages=keep_pages, length=length, per=per, layer=layer
    )
    lists = chosen.shape[1]
    row = jnp.arange(batch)[:, None, None]
    head = (jnp.arange(lists) * kv_heads // lists)[:, None]

    def gather(x: jax.Array) -> jax.Array:
        """`[B, lists, keys, D]` of the chosen pages."""
        before = () if layer is None else (layer,)
        if layout == "heads_first":
            x = x.reshape(*lead, count, size, dim)
            at: tuple[Any, ...] = (*before, row, head, chosen)
        else:
            x = x.reshape(*lead[:-1], count, size, kv_heads, dim)
            at = (*before, row, chosen, slice(None), head)
        x = x.at[at].get(mode="promise_in_bounds")
        return x.reshape(batch, lists, -1, dim).astype(q.dtype)

    slot = chosen[..., None] * size + jnp.arange(size)
    seen = slot < jnp.reshape(jnp.asarray(length), (-1, 1, 1, 1))
    if valid is not None:
        seen &= valid.reshape(batch, count, size)[row, chosen]
    seen = seen.reshape(batch, lists, 1, -1)
    s = jnp.einsum(
        "bngd,bnsd->bngs", q.reshape(batch, lists, -1, dim), gather(k),
        precision="highest", preferred_element_type=jnp.float32,
    ) * (dim**-0.5 if scale is None else scale)  # fmt: skip
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(seen, s, -jnp.inf)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    # What is not seen may be anything: a weight of 0 times NaN would be NaN.
    values = jnp.where(seen[:, :, 0, :, None], gather(v), 0)
    y = jnp.einsum(
        "bngs,bnsd->bngd", p.astype(q.dtype), values,
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    y = y / jnp.where(total > 0, total, 1)
    return y.astype(q.dtype).reshape(batch, 1, heads, dim)


def _heads_first_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
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
