"""`KVCache`: keys and values of what a decoder has read so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax._kv_cache_options import KVCacheOptions
from angeljax.attention.quest import KeyPages, init_pages
from angeljax.kv_cache._quantized import QuantizedKV, empty
from angeljax.models.config import DecoderConfig

# Keys, or values, as they are or as codes and scales.
Stored = jax.Array | QuantizedKV
# One for each layer, or one for all of them with a leading layer axis.
Layers = Stored | tuple[Stored, ...]


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
        the tuple, scanned ones with the array. Or each a `QuantizedKV` of that shape:
        attention then sees the values that it stands for, those of the new tokens too,
        so that a prompt gives the same read at once, in chunks or token by token.
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
      k, v: `[B, num_kv_heads, slots, head_dim]`, or with a leading layer axis; arrays,
        or `QuantizedKV` of that shape; or a `Held`.
      pages: bounds of the keys, likewise; None without.
      slot: int32 scalar, where the first of the new tokens goes; `[B]` where rows
        differ.
      layer: index of the layer if `k` and `v` hold all of them.
      real: bool `[B, T]`, which of the new tokens are no padding; None if all are.
    """

    k: Any
    v: Any
    pages: Any
    slot: jax.Array
    layer: Any = None
    real: jax.Array | None = None


class Held(NamedTuple):
    """A store with entries that the next write puts in front of its own.

    A write of few slots is a kernel: entries that are known before a write come with it
    for nothing.

    Attributes:
      store: an array as in `Store`.
      rows: `[B, num_kv_heads, R, head_dim]`.
      valid: int32 `[B]`, how many of them count: they go before the slot of the write.
    """

    store: jax.Array
    rows: jax.Array
    valid: jax.Array

    @property
    def dtype(self) -> Any:
        """Of the store."""
        return self.store.dtype

    def before(self, new: jax.Array) -> jax.Array:
        """These and the entries `[B, T, num_kv_heads, head_dim]`, R + T of each row."""
        size, many = self.rows.shape[2], new.shape[1]

        def row(held: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
            # Shifted and chosen, not joined and gathered: that is one kernel.
            held = jnp.pad(jnp.swapaxes(held, 0, 1), [(0, many), (0, 0), (0, 0)])
            new = jnp.pad(new, [(size, size), (0, 0), (0, 0)])
            new = jax.lax.dynamic_slice_in_dim(new, size - count, size + many)
            first = jnp.arange(size + many) < count
            return jnp.where(first[:, None, None], held, new)

        if len(new) == 1:
            return row(self.rows[0], new[0], self.valid[0])[None]
        return jax.vmap(row)(self.rows, new, self.valid)


def init_cache(
    config: DecoderConfig,
    batch: int,
    slots: int,
    dtype: Any = jnp.bfloat16,
    *,
    stacked: bool = False,
    page_size: int | None = None,
    kv_cache: KVCacheOptions | None = None,
    scales: Mapping[str, jax.Array] | None = None,
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
      kv_cache: how keys and values are stored; None for `dtype`.
      scales: the static ones that `kv_cache` needs, "k" and "v", as
        `angeljax.kv_cache.kv_scales` gives them.

    Returns:
      A `KVCache` of zeros, length 0.

    Raises:
      ValueError: slots that are no whole pages, or a format that the model's heads, the
        form of the cache or its pages do not go with.

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

    count = config.num_layers
    skipped = frozenset() if kv_cache is None else kv_cache.skips(count)
    if kv_cache is not None and page_size is not None:
        raise ValueError(
            "sparse decoding reads keys and values as they are: leave out the decode "
            "option of attention, or kv_cache"
        )
    if skipped and stacked:
        raise ValueError(
            "kv_cache.skip_layers needs layers of their own: use a model with "
            "scan_layers=False (unstack_layers), or leave it out"
        )

    def layers(side: str) -> Layers:
        fmt = None if kv_cache is None else kv_cache.of(side)
        if fmt is not None and fmt.format != "none":
            fmt.check(config.head_dim)
            scale = (scales or {}).get(side) if fmt.static else None
            if fmt.static and scale is None:
                raise ValueError(
                    f"kv_cache granularity {fmt.granularity} needs scales[{side!r}]"
                )
            if stacked:
                return empty((count, *shape), fmt, dtype, scale)
            return tuple(
                jnp.zeros(shape, dtype)
                if i in skipped
                else empty(shape, fmt, dtype, None if scale is None else scale[i])
                for i in range(count)
            )
        if stacked:
            return jnp.zeros((count, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(count))

    k = layers("k")
    pages = None
    if page_size is not None:
        pages = jax.tree.map(lambda x: init_pages(x, page_size=page_size), k)
    return KVCache(
        k=k,
        v=layers("v"),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        pages=pages,
        rope_delta=jnp.zeros(batch, jnp.int32) if config.mrope_section else None,
    )


def write(
    store: Stored | Held, new: jax.Array, slot: jax.Array, layer: Any = None
) -> tuple[Stored, jax.Array]:
    """Writes the keys (or values) of new tokens.

    Args:
      store: `[B, num_kv_heads, slots, head_dim]`, or with a leading layer axis; a
        `Held` with what stands before the new tokens.
      new: `[B, T, num_kv_heads, head_dim]`.
      slot: int32 scalar, where the first of them goes; `[B]` where rows differ.
      layer: index of the layer if `store` holds all of them.

    Returns:
      The store, and what the layer now attends to, `[B, slots, num_kv_heads,
      head_dim]`.
    """
    stacked = () if layer is None else (layer,)
    seen: Any
    if isinstance(store, QuantizedKV):
        if jnp.ndim(slot) != 0:
            raise ValueError("rows of a quantized cache cannot differ in length")
        part = store if layer is None else store.at(layer)
        codes = part.encode(jnp.swapaxes(new, 1, 2))
        store = store.put(codes, (*stacked, 0, 0, slot, 0))
        seen = (store if layer is None else store.at(layer)).dequantize()
        return store, jnp.swapaxes(seen, 1, 2)
    new = new.astype(store.dtype)
    if isinstance(store, Held):
        new, slot = store.before(new), slot - store.valid
        store = store.store
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


def kept(store: Stored | Held, new: jax.Array, layer: Any = None) -> jax.Array:
    """What a store would give back of new tokens `[B, T, num_kv_heads, head_dim]`."""
    if not isinstance(store, QuantizedKV):
        return new.astype(store.dtype)
    part = store if layer is None else store.at(layer)
    return jnp.swapaxes(part.encode(jnp.swapaxes(new, 1, 2)).dequantize(), 1, 2)
