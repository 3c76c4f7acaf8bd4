"""Sparse prefill of a whole model: `SparseAttention`, and what it is told."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from angeljax.attention._selector import Selector
from angeljax.attention.decode import Quest
from angeljax.attention.sparse import sparse_attention, worthwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """Where the queries of a layer stand; a decoder passes it in place of a mask.

    Its tokens are packed: query i of a row has the position `offset + i`, and padding
    follows the last real one. `pack` and `unpack` do that once for all layers.

    Attributes:
      num_layers: of the model.
      total: tokens of the whole prompt.
      layer: number of the layer from 0; traced under a scan.
      start: position of the first query where it is known while tracing. The keys are
        then the first `start + T` slots of the cache; with 0, the layer's own.
      offset: int32 `[B]`, the position of the first query where `start` is None.
      slots: int32 `[B, S]`, in which slot the key of each position lies, where `start`
        is None.
      lengths: int32 `[B]`, real keys of each row; None if all are.
    """

    num_layers: int
    total: int
    layer: int | jax.Array = 0
    start: int | None = 0
    offset: jax.Array | None = None
    slots: jax.Array | None = None
    lengths: jax.Array | None = None

    def at(self, layer: int | jax.Array) -> Prefill:
        """The same for another layer."""
        return dataclasses.replace(self, layer=layer)


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """The `attention_fn` of a decoder whose prefill is sparse.

    Prompts go through `sparse_attention`; steps that read less than one block of tokens
    (decoding, checking of drafts) are dense as before, and so are layers with a sliding
    window. No mask `[T, S]` is made. With `decode` steps of one token are sparse too.

    Attributes:
      selector: names the blocks.
      layers: layers with a selector of their own, `((number, selector), ...)`; negative
        numbers count from the last layer.
      dense_below, dense_above, mean_correction, kv_dtype, implementation: see
        `sparse_attention`.
      decode: how single tokens read the cache; None for all of it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.attention import SparseAttention, selector
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> sparse = SparseAttention(selector("a_shape"), dense_below=0)
      >>> model = LanguageModel(config, attention_fn=sparse)
      >>> tokens = jax.ShapeDtypeStruct((1, 131072), jnp.int32)
      >>> jax.eval_shape(model.logits, model.abstract(), tokens).shape
      (1, 131072, 32)
    """

    selector: Selector
    layers: tuple[tuple[int, Selector], ...] = ()
    dense_below: int | None = None
    dense_above: float | None = None
    mean_correction: bool = False
    decode: Quest | None = None
    kv_dtype: str | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in (None, "float8_e4m3fn"):
            raise ValueError(
                f"kv_dtype must be None or 'float8_e4m3fn', not {self.kv_dtype!r}"
            )
        for what in (self.selector, *(s for _, s in self.layers)):
            if not isinstance(what, Selector):
                raise ValueError(
                    f"selector must be one of angeljax.attention.selector(name), not a "
                    f"{type(what).__name__}"
                )

    def selector_of(self, layer: int, num_layers: int) -> Selector:
        """The selector of a layer.

        Raises:
          ValueError: `layers` names one that the model has not.
        """
        found = self.selector
        for number, chosen in self.layers:
            if not -num_layers <= number < num_layers:
                raise ValueError(
                    f"attention of layer {number}: the model has {num_layers} layers"
                )
            if number % num_layers == layer:
                found = chosen
        return found

    def sparse(self, length: int, total: int, num_layers: int) -> bool:
        """Whether any layer would be sparse: else a decoder is dense all through.

        Args:
          length: tokens that are read at once.
          total: of the whole prompt.
          num_layers: of the model.
        """
        picks = [self.selector_of(i, num_layers) for i in range(num_layers)]
        return any(
            length >= pick.block_size
            and worthwhile(
                pick,
                total,
                num_layers,
                layer=i,
                dense_below=self.dense_below,
                dense_above=self.dense_above,
            )[0]
            for i, pick in enumerate(picks)
        )

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, where: Prefill
    ) -> jax.Array:
        """Attention of one layer.

        Args:
          q: `[B, T, H, D]`.
          k, v: `[B, S, Hkv, D]`, by slot.
          where: from the decoder.

        Returns:
          `[B, T, H, D]`.
        """
        if not isinstance(where, Prefill):
            raise ValueError(
                "SparseAttention is told by angeljax.models.Decoder where its queries "
                "stand; for other models see angeljax.attention.hooks"
            )
        if isinstance(where.layer, int):
            return self._run(
                q, k, v, where, self.selector_of(where.layer, where.num_layers)
            )
        picks = [self.selector_of(i, where.num_layers) for i in range(where.num_layers)]
        kinds = list(dict.fromkeys(picks))
        if len(kinds) == 1:
            return self._run(q, k, v, where, kinds[0])
        which = jnp.asarray([kinds.index(pick) for pick in picks])[where.layer]
        branches = [
            functools.partial(self._run, where=where, selector=kind) for kind in kinds
        ]
        return jax.lax.switch(which, branches, q, k, v)

    def _run(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        where: Prefill,
        selector: Selector,
    ) -> jax.Array:
        run = functools.partial(
            sparse_attention,
            selector=selector,
            layer=where.layer,
            num_layers=where.num_layers,
            total=where.total,
            lengths=where.lengths,
            mean_correction=self.mean_correction,
            dense_below=self.dense_below,
            dense_above=self.dense_above,
            kv_dtype=self.kv_dtype,
            implementation=self.implementation,
        )
        if where.start is None:
            return _anywhere(q, k, v, where, selector.block_size, run)
        # What would stand behind the end of the prompt is padding.
        t = q.shape[1]
        end = min(where.start + t, where.total)
        q = q[:, : end - where.start]
        y = run(q, k[:, :end], v[:, :end], q_offset=where.start)
        return jnp.pad(y, ((0, 0), (0, t - y.shape[1]), (0, 0), (0, 0)))


def _anywhere(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Prefill,
    size: int,
    run: Callable[..., jax.Array],
) -> jax.Array:
    """Keys in the order of their positions, queries on the grid of blocks."""
    assert where.offset is not None and where.slots is not None
    t, before = q.shape[1], where.offset % size
    rows = t + size - 1  # the first query is at most the last of its block
    room = max(rows - k.shape[1], 0)
    slots = jnp.pad(where.slots, ((0, 0), (0, room)), mode="edge")
    k, v = (jnp.take_along_axis(x, slots[..., None, None], axis=1) for x in (k, v))
    # Rows before the first query, and after the last, repeat one: they are cut off.
    source = jnp.clip(jnp.arange(rows) - before[:, None], 0, t - 1)
    q = jnp.take_along_axis(q, source[..., None, None], axis=1)
    y = run(q, k, v, q_offset=where.offset - before)
    target = jnp.arange(t) + before[:, None]
    return jnp.take_along_axis(y, target[..., None, None], axis=1)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Tokens of padded rows, with the padding moved to the end.

    Attributes:
      place: int32 `[B, T]`, where each column goes; None if nothing moves.
    """

    place: jax.Array | None

    @classmethod
    def of(cls, mask: jax.Array | None) -> Packing:
        """From bool `[B, T]`, True for real tokens, which may stand anywhere."""
        if mask is None:
            return cls(None)
        real = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
        others = jnp.arange(1, mask.shape[-1] + 1) - real
        return cls(jnp.where(mask, real, real[..., -1:] + others) - 1)

    def pack(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` with the padding at the end."""
        return x if self.place is None else _along(x, _inverse(self.place, x.shape[1]))

    def unpack(self, x: jax.Array, *, last_only: bool = False) -> jax.Array:
        """Inverse of `pack`; or its last column alone, `[B, 1, ...]`."""
        if self.place is None:
            return x[:, -1:] if last_only else x
        return _along(x, self.place[:, -1:] if last_only else self.place)


def _along(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), 1)


def _inverse(place: jax.Array, size: int) -> jax.Array:
    """int32 `[B, size]`: the column that goes to each place, 0 where none does.

    Columns that are to go nowhere have a place from `size` on.
    """
    columns = jnp.broadcast_to(jnp.arange(place.shape[1], dtype=jnp.int32), place.shape)
    rows = jnp.arange(len(place))[:, None]
    found = jnp.zeros((len(place), size), jnp.int32)
    return found.at[rows, place].set(columns, mode="drop")


def slots_by_position(positions: jax.Array) -> jax.Array:
    """In which slot each position lies, int32 `[B, S]`.

    Args:
      positions: int32 `[B, S]` of a cache, -1 for slots without a key. The positions of
        a row are 0, 1, ... without gaps, in any order.

    Returns:
      The slot of positions 0, 1, ...; behind the last position, any slot.
    """
    size = positions.shape[1]
    return _inverse(jnp.where(positions < 0, size, positions), size)
