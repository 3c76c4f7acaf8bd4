"""`KVCache`: keys and values of what a decoder has read so far."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.attention.quest import KeyPages, init_pages
from angeljax.models.config import DecoderConfig

# One array for each layer, or one for all of them with a leading layer axis.
Layers = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of what was read so far; a pytree of static shapes.

    A step writes one slot of each array and hands the rest on, so that XLA updates a
    donated cache, and the one that a loop carries, in place.

    Attributes:
      k, v: a tuple with `[B, num_kv_heads, slots, head_dim]` for each layer, or one
        array `[layers, B, num_kv_heads, slots, head_dim]`; keys after rotation. The
        decoder takes both and gives back what it took. Unrolled layers are fastest with
        the tuple, scanned ones with the array.
      positions: int32 `[B, slots]`, how many tokens of the row precede that of each
        slot, -1 for padding and for slots that are not filled.
      length: int32 scalar, slots that are filled.
      pages: bounds of the keys for sparse decoding, stacked or apart as `k` is; None
        without.
      rope_delta: int32 `[B]`, rotary position of the next token less the number of
        tokens before it, so that decoding goes on where a prompt with images, or with
        pruned tokens, ended; None where the two are the same.
    """

    k: Layers
    v: Layers
    positions: jax.Array
    length: jax.Array
    pages: KeyPages | tuple[KeyPages, ...] | None = None
    rope_delta: jax.Array | None = None

    def store(self, layer: int, real: jax.Array | None = None) -> Store:
        """What an unrolled layer reads and writes."""
        k: Any = self.k
        v: Any = self.v
        if not isinstance(k, tuple):
            return Store(k, v, self.pages, self.length, layer, real)
        pages = self.pages[layer] if isinstance(self.pages, tuple) else None
        return Store(k[layer], v[layer], pages, self.length, None, real)


class Store(NamedTuple):
    """The part of a cache that one layer is given.

    Attributes:
      k, v: `[B, num_kv_heads, slots, head_dim]`, or with a leading layer axis.
      pages: bounds of the keys, likewise; None without.
      slot: int32 scalar, where the first of the new tokens goes; `[B]` where rows
        differ.
      layer: index of the layer if `k` and `v` hold all of them.
      real: bool `[B, T]`, which of the new tokens are no padding; None if all are.
    """

    k: jax.Array
    v: jax.Array
    pages: Any
    slot: jax.Array
    layer: Any = None
    real: jax.Array | None = None


def init_cache(
    config: DecoderConfig,
    batch: int,
    slots: int,
    dtype: Any = jnp.bfloat16,
    *,
    stacked: bool = False,
    page_size: int | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      config: of the model.
      batch: rows.
      slots: tokens that a row can hold, prompt and padding included.
      dtype: of keys and values.
      stacked: one array for all layers, for `scan_layers`.
      page_size: slots of a page, for sparse decoding, which divides `slots`; None for
        a cache without pages.

    Returns:
      A `KVCache` of zeros, length 0.

    Raises:
      ValueError: slots that are no whole pages.

    Example:
      >>> from angeljax.models import DecoderConfig, init_cache
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> cache = init_cache(config, batch=3, slots=64)
      >>> len(cache.k), cache.k[0].shape
      (2, (3, 1, 64, 8))
      >>> init_cache(config, batch=3, slots=64, stacked=True).v.shape
      (2, 3, 1, 64, 8)
    """
    # Slots beside the features: the products of attention are then batched over leading
    # axes, which needs no transposed copy of the whole cache.
    shape = (batch, config.num_kv_heads, slots, config.head_dim)

    def empty() -> Layers:
        if stacked:
            return jnp.zeros((config.num_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    k = empty()
    pages = None
    if page_size is not None:
        pages = jax.tree.map(lambda x: init_pages(x, page_size=page_size), k)
    return KVCache(
        k=k,
        v=empty(),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        pages=pages,
        rope_delta=jnp.zeros(batch, jnp.int32) if config.mrope_section else None,
    )


def write(
    store: jax.Array, new: jax.Array, slot: jax.Array, layer: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Writes the keys (or values) of new tokens.

    Args:
      store: `[B, num_kv_heads, slots, head_dim]`, or with a leading layer axis.
      new: `[B, T, num_kv_heads, head_dim]`.
      slot: int32 scalar, where the first of them goes; `[B]` where rows differ.
      layer: index of the layer if `store` holds all of them.

    Returns:
      The store, and what the layer now attends to, `[B, slots, num_kv_heads,
      head_dim]`.
    """
    new = new.astype(store.dtype)
    stacked = () if layer is None else (layer,)
    if jnp.ndim(slot) == 0 or len(slot) == 1:
        put = jnp.swapaxes(new, 1, 2)
        put = put if layer is None else put[None]
        at = (*stacked, 0, 0, jnp.reshape(slot, ()), 0)
        store = jax.lax.dynamic_update_slice(store, put, at)
    else:
        # Mapped over the rows, the update of a stack would copy all of it.
        row = jnp.arange(len(slot))[:, None]
        at = (*stacked, row, slice(None), slot[:, None] + jnp.arange(new.shape[1]))
        store = store.at[at].set(new, mode="promise_in_bounds", unique_indices=True)
    seen = store
    if layer is not None:
        seen = jax.lax.dynamic_index_in_dim(store, layer, keepdims=False)
    return store, jnp.swapaxes(seen, 1, 2)
