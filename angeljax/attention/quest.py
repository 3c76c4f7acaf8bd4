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

from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention._estimate import products
from angeljax.attention._key_pages import (
    KeyPages,
    heads_first_shape,
    init_pages,
    page_bounds,
    update_pages,
)

__all__ = ["KeyPages", "init_pages", "quest_attention", "select_pages", "update_pages"]

PER = ("kv_head", "query_head")


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
      >>> @jax.jit
      ... def attend(q, k):
      ...     pages = update_pages(init_pages(k), k.swapaxes(1, 2), 0)
      ...     return quest_attention(q, k, k, pages, keep_pages=2, length=64)
      >>> attend(q, k).shape
      (1, 1, 4, 16)
    """
    *lead, slots, dim = heads_first_shape(k.shape, layout)
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
    s = products("bngd,bnsd->bngs", q.reshape(batch, lists, -1, dim), gather(k))
    s = s * (dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(seen, s, -jnp.inf)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    # What is not seen may be anything: a weight of 0 times NaN would be NaN.
    values = jnp.where(seen[:, :, 0, :, None], gather(v), 0)
    y = products("bngs,bnsd->bngd", p.astype(q.dtype), values)
    y = y / jnp.where(total > 0, total, 1)
    return y.astype(q.dtype).reshape(batch, 1, heads, dim)
