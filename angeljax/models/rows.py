"""Rows that advance at different speeds: a cache without a common length.

`KVCache` holds rows of one length, padded on the left. Here every row starts at slot 0,
the slot of a token is its position, and each row is written where it stands. Nothing is
said about which slots hold a token: whoever reads gives a mask, so that going back is a
matter of not looking, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax.attention.prefill import SparseAttention
from angeljax.models.attention import causal_attention, dense_attention
from angeljax.models.cache import Held, Layers, Store
from angeljax.models.features import check_layers
from angeljax.models.rope import cos_sin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCache:
    """Keys and values by position.

    Attributes:
      k, v: as those of a `KVCache`: a tuple with `[B, num_kv_heads, slots, head_dim]`
        for each layer, or one array `[layers, B, num_kv_heads, slots, head_dim]`.
      held: entries that the next reading puts in place; None without.
      rope_delta: int32 `[B]`, what is added to positions before they turn queries and
        keys, where a prompt with images ended elsewhere than its tokens; or None.
    """

    k: Layers
    v: Layers
    held: HeldRows | None = None
    rope_delta: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowInputs:
    """What is read in place of the embeddings of tokens, as by a model that sees.

    Attributes:
      embeds: `[B, T, hidden_size]`.
      rotary: int32 `[B, T]`, or `[3, B, T]` for M-RoPE; None for the positions.
      deepstack: planes `[B, T, hidden_size]` that are added behind the first layers.
      rope_delta: for the cache.
    """

    embeds: jax.Array
    rotary: jax.Array | None = None
    deepstack: tuple[jax.Array, ...] = ()
    rope_delta: jax.Array | None = None


class HeldRows(NamedTuple):
    """Entries of all layers that go before the slots of the next reading.

    Attributes:
      k, v: as those of a `RowCache`, with R slots.
      valid: int32 `[B]`, how many of these count.
    """

    k: Layers
    v: Layers
    valid: jax.Array


def hold_rows(
    cache: RowCache, starts: jax.Array, path: jax.Array, count: jax.Array
) -> RowCache:
    """The entries at `starts + path`, to be put at `starts` and on by the next reading.

    That must be at `starts + count`.

    Args:
      cache: without held entries.
      starts: int32 `[B]`.
      path: int32 `[B, R]`, what is added to `starts`.
      count: int32 `[B]`, how many of them matter.

    Returns:
      The cache, nothing of it moved.
    """

    at = starts[:, None] + path

    def taken(x: jax.Array) -> jax.Array:
        # Rows of a matrix: anything else comes out in an order that XLA for GPUs turns
        # round again, with a kernel for each array.
        *batch, heads, slots, features = x.shape
        first = slots * jnp.arange(math.prod(batch) * heads, dtype=jnp.int32)
        each = jnp.repeat(at, heads, axis=0)
        each = jnp.tile(each, (len(first) // len(each), 1))
        rows = (first[:, None] + each).astype(jnp.int32)
        found = x.reshape(-1, features).at[rows].get(mode="promise_in_bounds")
        return found.reshape(*batch, heads, path.shape[1], features)

    k, v = jax.tree.map(taken, (cache.k, cache.v))
    return dataclasses.replace(cache, held=HeldRows(k, v, count))


def settle_rows(cache: RowCache, slots: jax.Array) -> RowCache:
    """The cache with what it holds put before `slots`, int32 `[B]`."""
    if (held := cache.held) is None:
        return cache
    start = slots - held.valid
    row = jnp.arange(len(start))[:, None]

    def put(x: jax.Array, rows: jax.Array) -> jax.Array:
        if len(start) == 1:
            return jax.lax.dynamic_update_slice_in_dim(x, rows, start[0], x.ndim - 2)
        at = start[:, None] + jnp.arange(rows.shape[-2])
        goal = (..., row, slice(None), at, slice(None))
        # The indices come first, and then the layers of a stack.
        rows = jnp.moveaxis(rows, (x.ndim - 4, x.ndim - 2), (0, 1))
        return x.at[goal].set(rows, mode="promise_in_bounds", unique_indices=True)

    k, v = jax.tree.map(put, (cache.k, cache.v), (held.k, held.v))
    return dataclasses.replace(cache, k=k, v=v, held=None)


class Rows(NamedTuple):
    """What `read_rows` returns.

    Attributes:
      final: `[B, T, hidden_size]` of the last layer, before the final norm.
      hidden: outputs of the layers that were asked for, `[B, T, hidden_size]` each.
      cache: with the keys and values of what was read.
    """

    final: jax.Array
    hidden: tuple[jax.Array, ...]
    cache: Any


def init_rows(
    config: Any, batch: int, slots: int, dtype: Any, *, stacked: bool
) -> RowCache:
    """A cache of zeros; see `LanguageModel.init_rows`."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)

    def empty() -> Layers:
        if stacked:
            return jnp.zeros((config.num_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    return RowCache(empty(), empty())


def read_rows(
    module: Any,
    cache: RowCache,
    tokens: jax.Array,
    *,
    positions: jax.Array,
    slots: jax.Array,
    mask: jax.Array,
    key_positions: jax.Array | None = None,
    layers: Sequence[int] | None = None,
    hidden: Sequence[int] = (),
    inputs: RowInputs | None = None,
) -> Rows:
    """Reads T tokens of each row; see `LanguageModel.read_rows`."""
    config = module.config
    run, wanted = which_layers(config, layers, hidden)
    x, planes, rotary, cache = entry_of(module, cache, tokens, positions, inputs)
    rotation = cos_sin(config, rotary)
    fn = module.attention_fn
    if fn is causal_attention or isinstance(fn, SparseAttention):
        fn = dense_attention
    held = cache.held

    def behind(store: Any, rows: Any) -> Any:
        return store if held is None else Held(store, rows, held.valid)

    if module.scan_layers:
        windows = list(config.windows) or [0] * config.num_layers
        seen = _near(positions, mask, key_positions)
        told = seen if any(windows) else lambda _: mask
        order = [(i, windows[i], _place(wanted, i)) for i in run]

        def block(state: Any, x: Any, store: Store, window: Any) -> Any:
            layer = nnx.merge(graphdef, state)
            if held is not None:
                sides: Any = held.k, held.v
                rows = (_at(side, store.layer) for side in sides)
                k, v = map(behind, (store.k, store.v), rows)
                store = store._replace(k=k, v=v)
            return layer(x, rotation, told(window), store, fn)

        graphdef, state = nnx.split(module.layers)
        around = jnp.asarray(order), wanted, planes
        return _scan(block, state, cache, x, slots, *around)
    masks, windows = masks_of(config, positions, mask, key_positions)
    k: list[Any] = list(cast(Any, cache.k))
    v: list[Any] = list(cast(Any, cache.v))
    outputs = {}
    for i in run:
        store = Store(k[i], v[i], None, slots)
        if held is not None:
            ahead: Any = held
            store = store._replace(
                k=behind(k[i], ahead.k[i]), v=behind(v[i], ahead.v[i])
            )
        x, store = module.layers[i](x, rotation, masks[windows[i]], store, fn)
        x = x if i >= len(planes) else x + planes[i].astype(x.dtype)
        k[i], v[i] = store.k, store.v
        if i in wanted:
            # Whether anybody looks must not decide what is fused, and so rounded, how.
            x = jax.lax.optimization_barrier(x)
        outputs[i] = x
    found = tuple(outputs[i] for i in wanted)
    return Rows(x, found, dataclasses.replace(cache, k=tuple(k), v=tuple(v), held=None))


def entry_of(
    module: Any,
    cache: RowCache,
    tokens: jax.Array,
    positions: jax.Array,
    inputs: RowInputs | None,
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array, RowCache]:
    """What enters the first layer, planes, rotary positions, and the cache."""
    rotary = positions
    if cache.rope_delta is not None:
        rotary = rotary + cache.rope_delta[:, None]
    if inputs is None:
        return module.embed(tokens), (), rotary, cache
    rotary = rotary if inputs.rotary is None else inputs.rotary
    cache = dataclasses.replace(cache, rope_delta=inputs.rope_delta)
    return inputs.embeds.astype(module.dtype), inputs.deepstack, rotary, cache


def which_layers(
    config: Any, layers: Sequence[int] | None, hidden: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers that run, and those whose outputs are wanted.

    Raises:
      ValueError: one does not exist, or is wanted and does not run.
    """
    count = config.num_layers
    run = check_layers(range(count) if layers is None else layers, count)
    wanted = check_layers(hidden, count)
    if missing := set(wanted) - set(run):
        raise ValueError(f"hidden layer {min(missing)} is not among those that run")
    return run, wanted


def masks_of(
    config: Any, positions: jax.Array, mask: jax.Array, key_positions: jax.Array | None
) -> tuple[dict[int, jax.Array], list[int]]:
    """What tokens see by size of the window, and the windows of the layers."""
    windows = list(config.windows) or [0] * config.num_layers
    seen = _near(positions, mask, key_positions)
    return {w: seen(w) if w else mask for w in set(windows)}, windows


def _near(positions: jax.Array, mask: jax.Array, keys: jax.Array | None) -> Any:
    """`window -> mask` of a layer with a sliding window; 0 for none."""
    if keys is None:
        keys = jnp.arange(mask.shape[-1], dtype=jnp.int32)[None]
    distance = positions[:, :, None] - keys[:, None, :]

    def seen(window: Any) -> jax.Array:
        near = (distance < window) | (jnp.asarray(window) == 0)
        return mask & near[:, None]

    return seen


def _place(wanted: tuple[int, ...], layer: int) -> int:
    """Where a layer's output is kept; what nobody asked for goes to the last place."""
    return wanted.index(layer) if layer in wanted else len(wanted)


def _scan(
    block: Any,
    stack: Any,
    cache: RowCache,
    x: jax.Array,
    slots: jax.Array,
    order: jax.Array,
    wanted: tuple[int, ...],
    planes: tuple[jax.Array, ...],
) -> Rows:
    """The layers of a stack; `order` has (layer, window, place of its output)."""
    kept = jnp.zeros((len(wanted) + 1, *x.shape), x.dtype) if wanted else None
    added = jnp.stack([p.astype(x.dtype) for p in planes]) if planes else None

    def step(carry: Any, entry: jax.Array) -> tuple[Any, None]:
        x, k, v, kept = carry
        layer, window, place = entry
        state = jax.tree.map(lambda a: _at(a, layer), stack)
        x, store = block(state, x, Store(k, v, None, slots, layer), window)
        if added is not None:
            plane = added[jnp.minimum(layer, len(added) - 1)]
            x = x + jnp.where(layer < len(added), plane, 0)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, place, 0)
        return (x, store.k, store.v, kept), None

    carry, _ = jax.lax.scan(step, (x, cache.k, cache.v, kept), order)
    x, k, v, kept = carry
    # A layer may have been asked for twice.
    found = () if kept is None else tuple(kept[wanted.index(i)] for i in wanted)
    return Rows(x, found, dataclasses.replace(cache, k=k, v=v, held=None))


def _at(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
