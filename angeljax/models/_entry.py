"""What a decoder is given to read, and where it stands: in order and in rotation.

The order of the tokens in their row decides what sees what, and which slot of a cache
is whose. Rotary positions follow it, unless others are given: those of an image have
three axes, and tokens that were pruned leave gaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention.prefill import Packing
from angeljax.models.cache import KVCache
from angeljax.models.config import DecoderConfig
from angeljax.models.rope import cos_sin


@dataclasses.dataclass(frozen=True)
class Reading:
    """The arguments of `Decoder.__call__` that have one entry for each token."""

    tokens: jax.Array | None
    embeds: jax.Array | None = None
    positions: jax.Array | None = None
    deepstack: tuple[jax.Array, ...] = ()
    mask: jax.Array | None = None

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        tokens: jax.Array | None,
        embeds: jax.Array | None,
        positions: jax.Array | None,
        deepstack: Sequence[jax.Array] | jax.Array | None,
        mask: jax.Array | None,
    ) -> Reading:
        """The arguments, checked against each other.

        Raises:
          ValueError: one has a shape that does not fit.
        """
        planes = () if deepstack is None else tuple(deepstack)
        if (tokens is None) == (embeds is None):
            raise ValueError("give either tokens or embeds, the other None")
        if embeds is not None and embeds.shape[2:] != (config.hidden_size,):
            raise ValueError(
                f"embeds must be [batch, length, {config.hidden_size}], not "
                f"{embeds.shape}"
            )
        shape = cls(tokens, embeds).shape
        if mask is not None and mask.shape != shape:
            raise ValueError(f"mask has shape {mask.shape}, the tokens have {shape}")
        if positions is not None:
            axes = [shape, (3, *shape)] if config.mrope_section else [shape]
            if positions.shape not in axes:
                raise ValueError(
                    f"positions must be {' or '.join(map(str, axes))}, not "
                    f"{positions.shape}"
                    + ("" if len(axes) > 1 else ": the model has no mrope_section")
                )
        if len(planes) > config.num_layers:
            raise ValueError(
                f"{len(planes)} deepstack planes for {config.num_layers} layers"
            )
        for plane in planes:
            if plane.shape != (*shape, config.hidden_size):
                raise ValueError(
                    f"each deepstack plane must be {(*shape, config.hidden_size)}, not "
                    f"{plane.shape}"
                )
        return cls(tokens, embeds, positions, planes, mask)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        given = self.tokens if self.embeds is None else self.embeds
        assert given is not None, "one of the two is given"
        return given.shape[0], given.shape[1]

    def pack(self, packing: Packing) -> Reading:
        """All of it with the padding of each row at its end."""
        if packing.place is None:
            return self
        positions = self.positions
        if positions is not None and positions.ndim == 3:
            positions = jax.vmap(packing.pack)(positions)
        elif positions is not None:
            positions = packing.pack(positions)
        others = dataclasses.replace(self, positions=None)
        packed = {
            field.name: jax.tree.map(packing.pack, getattr(others, field.name))
            for field in dataclasses.fields(others)
        }
        return Reading(**{**packed, "positions": positions})


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where the tokens of a `Reading` stand.

    Attributes:
      rotation: cos and sin of their rotary positions.
      order: int32 `[B, T]`, how many tokens precede each in its row; -1 for padding.
      keys: int32 `[B, S]`, the same for all that they may see.
      rope_delta: int32 `[B]` for the cache, or None; see `KVCache`.
    """

    rotation: tuple[jax.Array, jax.Array]
    order: jax.Array
    keys: jax.Array
    rope_delta: jax.Array | None

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        read: Reading,
        cache: KVCache | None,
        next_position: jax.Array | None = None,
    ) -> Entry:
        """From what is read and what the cache holds."""
        shape = read.shape
        seen: Any = 0
        if cache is not None:
            seen = jnp.max(cache.positions, -1, keepdims=True) + 1
        if read.mask is None:
            order = jnp.broadcast_to(jnp.arange(shape[1]), shape)
            order = order.astype(jnp.int32) + seen
        else:
            count = jnp.cumsum(read.mask, axis=-1, dtype=jnp.int32) - 1 + seen
            order = jnp.where(read.mask, count, -1)
        keys, delta = order, None
        rotary = jnp.maximum(order, 0) if read.positions is None else read.positions
        if cache is not None:
            at = (0, cache.length)
            keys = jax.lax.dynamic_update_slice(cache.positions, order, at)
            if read.positions is None and cache.rope_delta is not None:
                rotary = rotary + cache.rope_delta[:, None]
            delta = _delta(read.positions, next_position, order, keys, cache)
        return cls(cos_sin(config, rotary), order, keys, delta)

    def leave(self, cache: KVCache) -> KVCache:
        """The cache after the tokens, whose keys and values it already has."""
        return dataclasses.replace(
            cache,
            positions=self.keys,
            length=cache.length + self.order.shape[1],
            rope_delta=self.rope_delta,
        )


def _delta(
    positions: jax.Array | None,
    next_position: jax.Array | None,
    order: jax.Array,
    keys: jax.Array,
    cache: KVCache,
) -> jax.Array | None:
    """How far the next token's rotary position is from its place in the row."""
    if next_position is None:
        if positions is None:
            return cache.rope_delta
        last = jnp.max(jnp.where(order >= 0, positions, -1), axis=-1)
        last = jnp.max(last, axis=0) if last.ndim == 2 else last
        before = jnp.max(cache.positions, axis=-1) + 1
        if cache.rope_delta is not None:
            before = before + cache.rope_delta
        next_position = jnp.maximum(last + 1, before)
    return jnp.asarray(next_position, jnp.int32) - jnp.max(keys, axis=-1) - 1
