"""Hidden states of a decoder, for losses that look inside it.

A forward without a cache and without logits: what a training loss needs, which runs the
head itself, a few tokens at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What `LanguageModel.features` returns.

    Attributes:
      final: `[B, T, D]` after the last norm: what the head multiplies.
      hidden: outputs of the layers that were asked for, `[B, T, D]` each.
      qkv: queries `[B, T, H, Dh]`, keys and values `[B, T, Hkv, Dh]` as attention sees
        them (after norms and rotary positions), of the layers asked for.
    """

    final: jax.Array
    hidden: tuple[jax.Array, ...] = ()
    qkv: tuple[tuple[jax.Array, jax.Array, jax.Array], ...] = ()


def check_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """The layers as a tuple.

    Raises:
      ValueError: one of them does not exist.
    """
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layer {layer} is none of the model's {count}, 0 first")
    return tuple(layers)


class Tap:
    """An attention function that keeps what it was given."""

    def __init__(self, attention_fn: Any) -> None:
        self.attention_fn = attention_fn
        self.seen: Any = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any) -> jax.Array:
        self.seen = q, k, v
        return self.attention_fn(q, k, v, mask)


def run_block(
    block: Any, x: Any, rotation: Any, mask: Any, attention_fn: Any, remat: Any
) -> tuple[jax.Array, Any]:
    """One layer: its output, and its queries, keys and values.

    Args:
      block: a `Block`.
      x: `[B, T, D]`.
      rotation, mask: see `Attention`.
      attention_fn: see `AttentionFn`.
      remat: False keeps all that the gradient needs; True computes it again; a policy
        of `jax.checkpoint_policies` keeps some of it.
    """
    graphdef, state = nnx.split(block)

    def run(state: Any, x: Any) -> tuple[jax.Array, Any]:
        tap = Tap(attention_fn)
        y, _ = nnx.merge(graphdef, state)(x, rotation, mask, None, tap)
        return y, tap.seen

    if remat is not False:
        policy = None if remat is True else remat
        run = jax.checkpoint(run, policy=policy)
    return run(state, x)


def loop(
    blocks: Sequence[Any],
    x: jax.Array,
    rotation: Any,
    masks: Sequence[jax.Array],
    attention_fn: Any,
    hidden: tuple[int, ...],
    relations: tuple[int, ...],
    remat: Any,
) -> tuple[jax.Array, Any, Any]:
    """All layers, one after another; `masks` holds one for each."""
    outputs, inside = {}, {}
    for i, (block, mask) in enumerate(zip(blocks, masks, strict=True)):
        x, qkv = run_block(block, x, rotation, mask, attention_fn, remat)
        if i in hidden:
            outputs[i] = x
        if i in relations:
            inside[i] = qkv
    found = tuple(outputs[i] for i in hidden), tuple(inside[i] for i in relations)
    return x, *found


def scan(
    layers: Any,
    x: jax.Array,
    rotation: Any,
    mask_of: Any,
    order: Any,
    attention_fn: Any,
    hidden: tuple[int, ...],
    relations: tuple[int, ...],
    remat: Any,
) -> tuple[jax.Array, Any, Any]:
    """All layers of a stack; `mask_of(place)` gives the mask of one.

    `order` holds the places: arrays with one entry for each layer.
    """
    graphdef, state = nnx.split(layers)
    count = len(jax.tree.leaves(order)[0])
    outer, inner = (tuple(dict.fromkeys(w)) for w in (hidden, relations))

    def one(x: Any, state: Any, place: Any) -> tuple[jax.Array, Any]:
        block = nnx.merge(graphdef, state)
        return run_block(block, x, rotation, mask_of(place), attention_fn, remat)

    # What was asked for is carried and written in place: as an output of the scan each
    # layer's would be kept. The last slot takes what nobody asked for.
    def slots(wanted: tuple[int, ...]) -> jax.Array:
        place = {layer: n for n, layer in enumerate(wanted)}
        return jnp.asarray([place.get(i, len(wanted)) for i in range(count)])

    def room(wanted: tuple[int, ...], like: Any) -> Any:
        if not wanted:
            return None
        return jax.tree.map(
            lambda s: jnp.zeros((len(wanted) + 1, *s.shape), s.dtype), like
        )

    def put(store: Any, values: Any, slot: jax.Array) -> Any:
        if store is None:
            return None
        update = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda s, v: update(s, v, slot, 0), store, values)

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, outputs, inside = carry
        layer, place, slot_hidden, slot_inside = inputs
        x, qkv = one(x, layer, place)
        return (x, put(outputs, x, slot_hidden), put(inside, qkv, slot_inside)), None

    first = jax.tree.map(lambda p: p[0], (state, order))
    like = jax.eval_shape(one, x, *first)
    carry = (x, room(outer, like[0]), room(inner, like[1]))
    inputs = (state, order, slots(outer), slots(inner))
    (x, outputs, inside), _ = jax.lax.scan(step, carry, inputs)
    found = tuple(outputs[outer.index(i)] for i in hidden)
    at = [inner.index(i) for i in relations]
    return x, found, tuple(tuple(p[n] for p in inside) for n in at)
