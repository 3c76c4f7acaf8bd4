"""One decoder-only transformer (nnx) for Llama, Mistral, Qwen2, Qwen3 and SmolLM.

Every product with a weight goes through `angeljax.ops`, so that a compressed tree runs
from its packed planes. Parameters lie under names such as
`layers/0/attn/q_proj/kernel`, kernels are `[in, out]`, and with `scan_layers` the
layers are one stack (`layers/attn/q_proj/kernel`, leading layer axis) that compiles
once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.attention.decode import Step
from angeljax.attention.prefill import Packing, Prefill, SparseAttention
from angeljax.models import features
from angeljax.models._entry import Entry, Reading
from angeljax.models._sparse import prefill_of, sparse_or_dense, standing
from angeljax.models.attention import attend_mask, causal_attention, dense_attention
from angeljax.models.cache import KVCache, Store
from angeljax.models.config import DecoderConfig
from angeljax.models.layers import (
    AttentionFn,
    Block,
    Embed,
    Linear,
    RMSNorm,
)


class Decoder(nnx.Module):
    """The language model.

    Args:
      config: sizes and switches.
      rngs: for the initial parameters.
      dtype: of activations.
      param_dtype: of the parameters.
      scan_layers: keep the layers as one stack and scan over it. Compiles in a fraction
        of the time; all layers then share one format.
      attention_fn: replaces softmax attention; see `AttentionFn`. With an
        `angeljax.attention.SparseAttention` long prompts are read with block-sparse
        attention, and nothing else changes.
      fused: one product `qkv_proj` for queries, keys and values, and one `gate_up_proj`
        in the MLP; see `fuse_projections`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        scan_layers: bool = False,
        attention_fn: AttentionFn = dense_attention,
        fused: bool = False,
    ) -> None:
        self.config, self.dtype, self.scan_layers = config, dtype, scan_layers
        self.attention_fn = attention_fn
        make = functools.partial(Block, config, fused=fused, dtype=param_dtype)
        self.embed_tokens = Embed(config, dtype=param_dtype, rngs=rngs)
        self.layers: Any
        if scan_layers:
            self.layers = nnx.vmap(lambda r: make(rngs=r))(
                rngs.split(config.num_layers)
            )
        else:
            self.layers = nnx.List([make(rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(
            config.hidden_size, config.norm_eps, dtype=param_dtype, rngs=rngs
        )
        self.lm_head = (
            None
            if config.tied
            else Linear(
                config.hidden_size,
                config.vocab_size,
                bias=False,
                dtype=param_dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        embeds: jax.Array | None = None,
        positions: jax.Array | None = None,
        deepstack: Sequence[jax.Array] | None = None,
        next_position: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        start: int | None = None,
        total: int | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Next-token logits.

        Args:
          tokens: int32 `[B, T]`.
          embeds: `[B, T, hidden_size]` in place of tokens, such as those of `embed`
            with images among them.
          positions: int32 `[B, T]`, the rotary positions where they are not the order
            of the tokens; `[3, B, T]` (time, height, width) for a model with
            `mrope_section`. What a token sees follows the order in any case.
          deepstack: `[B, T, hidden_size]` each, added to the outputs of the first
            layers (arXiv 2406.04334); zeros where nothing is to be added.
          next_position: int32 `[B]`, rotary position of the token that follows, which
            the cache keeps. Default: one more than the largest so far.
          mask: bool `[B, T]`, True for real tokens; padding may stand on either side.
          cache: continue after what it holds; T more slots must be free.
          last_only: give the logits of the last position only, `[B, 1, V]`.
          start: tokens that every row of the cache holds, where that is known while
            tracing: 0 for an empty one. Sparse prefill is then cheaper; nothing else
            looks at it.
          total: tokens of the whole prompt, of which these may be a chunk. Budgets of
            sparse prefill follow it. Default: T without a cache, else its slots.

        Returns:
          float32 logits `[B, T, V]`, and the cache with the new keys and values (None
          without a cache).

        Raises:
          ValueError: sparse attention cannot serve this model, `start` or `total`
            cannot be, or shapes do not fit.
        """
        x, cache = self.hidden(
            tokens,
            embeds=embeds,
            positions=positions,
            deepstack=deepstack,
            next_position=next_position,
            mask=mask,
            cache=cache,
            last_only=last_only,
            start=start,
            total=total,
        )
        return self.head(self.norm(x)), cache

    def hidden(
        self,
        tokens: jax.Array | None = None,
        *,
        embeds: jax.Array | None = None,
        positions: jax.Array | None = None,
        deepstack: Sequence[jax.Array] | None = None,
        next_position: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        start: int | None = None,
        total: int | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """What the last layer gives, `[B, T, hidden_size]` before the final norm.

        Arguments, cache and errors are those of a call.
        """
        attention_fn = self._attention(mask, cache)
        read = Reading.of(self.config, tokens, embeds, positions, deepstack, mask)
        prompt = self._prefill(read.shape[1], mask, cache, start, total)
        packing = Packing.of(mask if prompt is not None else None)
        read = read.pack(packing)
        x = self._embedded(read)
        entry = Entry.of(self.config, read, cache, next_position)
        order, keys, mask = entry.order, entry.keys, read.mask
        told = self._told(order, keys, standing(prompt, mask, cache, keys), cache)
        around = entry.rotation, mask, attention_fn, read.deepstack
        if self.scan_layers:
            mask_of = self._mask_of(told, order, keys)
            x, cache = self._scan(x, cache, mask_of, *around)
        else:
            x, cache = self._loop(x, cache, told, *around)
        x = packing.unpack(x, last_only=last_only)
        return x, None if cache is None else entry.leave(cache)

    def features(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        hidden: Sequence[int] = (),
        relations: Sequence[int] = (),
        remat: Any = False,
    ) -> features.Features:
        """Hidden states instead of logits; see `LanguageModel.features`."""
        count = self.config.num_layers
        wanted = features.check_layers(hidden, count)
        inside = features.check_layers(relations, count)
        prompt = self._prefill(tokens.shape[1], mask, None, None, None)
        packing = Packing.of(mask if prompt is not None else None)
        read = Reading.of(self.config, tokens, None, None, None, mask).pack(packing)
        x, entry = self._embedded(read), Entry.of(self.config, read, None)
        order, keys, mask = entry.order, entry.keys, read.mask
        told = self._told(order, keys, standing(prompt, mask, None, keys), None)
        around = (self._attention(mask, None), wanted, inside, remat)
        if self.scan_layers:
            mask_of = self._mask_of(told, order, keys)
            place = jnp.arange(count), jnp.asarray(self._windows(), jnp.int32)
            layers = self.layers
            found = features.scan(layers, x, entry.rotation, mask_of, place, *around)
        else:
            found = features.loop(list(self.layers), x, entry.rotation, told, *around)
        found = jax.tree.map(packing.unpack, found)
        return features.Features(self.norm(found[0]), *found[1:])

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `[B, T, hidden_size]` of int32 tokens `[B, T]`."""
        return ops.embed(self.embed_tokens.embedding[...], tokens, dtype=self.dtype)

    def _embedded(self, read: Reading) -> jax.Array:
        if read.tokens is not None:
            return self.embed(read.tokens)
        assert read.embeds is not None, "one of the two is given"
        return read.embeds.astype(self.dtype)

    def head(self, x: jax.Array) -> jax.Array:
        """float32 logits of normalised hidden states."""
        if self.lm_head is None:
            return ops.attend(x, self.embed_tokens.embedding[...])
        return ops.dot(x, self.lm_head.kernel[...], preferred_element_type=jnp.float32)

    def _attention(self, mask: Any, cache: KVCache | None) -> AttentionFn:
        """`causal_attention` is for full rows: anything else needs the mask."""
        plain = mask is None and cache is None and not any(self._windows())
        if self.attention_fn is causal_attention and not plain:
            return dense_attention
        if isinstance(self.attention_fn, SparseAttention):
            return sparse_or_dense(self.attention_fn)
        return self.attention_fn

    def _prefill(self, length: int, *given: Any) -> Prefill | None:
        windows, scanned = self._windows(), self.scan_layers
        return prefill_of(self.attention_fn, windows, scanned, length, *given)

    def _windows(self) -> list[int]:
        return list(self.config.windows) or [0] * self.config.num_layers

    def _loop(
        self,
        x: jax.Array,
        cache: KVCache | None,
        told: list[Any],
        rotation: Any,
        real: jax.Array | None,
        attention_fn: AttentionFn,
        planes: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, KVCache | None]:
        done: list[Any] = []
        for i, (layer, mask) in enumerate(zip(self.layers, told, strict=True)):
            store = None if cache is None else cache.store(i, real)
            x, store = layer(x, rotation, mask, store, attention_fn)
            x = x if i >= len(planes) else x + planes[i].astype(x.dtype)
            done.append(store)
            if cache is not None and not isinstance(cache.k, tuple):
                cache = _with(cache, store.k, store.v, store.pages)
        if cache is not None and isinstance(cache.k, tuple):
            pages = None if cache.pages is None else tuple(s.pages for s in done)
            k, v = tuple(s.k for s in done), tuple(s.v for s in done)
            cache = _with(cache, k, v, pages)
        return x, cache

    def _scan(
        self,
        x: jax.Array,
        cache: KVCache | None,
        mask_of: Any,
        rotation: Any,
        real: jax.Array | None,
        attention_fn: AttentionFn,
        planes: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, KVCache | None]:
        graphdef, state = nnx.split(self.layers)
        count = self.config.num_layers
        kv: Any = None if cache is None else (cache.k, cache.v, cache.pages)
        apart = cache is not None and isinstance(cache.k, tuple)
        if apart:
            kv = tuple(
                None if x is None else jax.tree.map(lambda *x: jnp.stack(x), *x)
                for x in kv
            )

        added = jnp.stack([p.astype(x.dtype) for p in planes]) if planes else None

        def step(carry: Any, layer: Any) -> tuple[Any, None]:
            # The cache is carried: as an input and output of the scan it would be
            # copied whole.
            h, kv = carry
            state, (i, window) = layer
            store = None
            if cache is not None:
                k, v, pages = kv
                store = Store(k, v, pages, cache.length, i, real)
            block = nnx.merge(graphdef, state)
            h, store = block(h, rotation, mask_of((i, window)), store, attention_fn)
            if added is not None:
                # Two scans, one with planes, would copy the stack of weights apart.
                h = h + jnp.where(
                    i < len(added), added[jnp.minimum(i, len(added) - 1)], 0
                )
            return (h, None if store is None else store[:3]), None

        order = jnp.arange(count), jnp.asarray(self._windows(), jnp.int32)
        (x, kv), _ = jax.lax.scan(step, (x, kv), (state, order))
        if cache is None:
            return x, None
        if apart:
            kv = [
                None
                if x is None
                else tuple(jax.tree.map(lambda a, i=i: a[i], x) for i in range(count))
                for x in kv
            ]
        return x, _with(cache, *kv)

    def _told(
        self,
        positions: jax.Array,
        keys: jax.Array,
        prompt: Prefill | None,
        cache: KVCache | None,
    ) -> list[Any]:
        """What each layer's attention is told; equal windows share one mask."""
        windows, one = self._windows(), positions.shape[1] == 1
        full = {w for w in windows if w or prompt is None}
        masks: dict[int, Any]
        masks = {w: attend_mask(positions, keys, w) for w in sorted(full)}
        sparse: Any = prompt
        if one and cache is not None and cache.pages is not None:
            fn = self.attention_fn
            if not isinstance(fn, SparseAttention) or fn.decode is None:
                raise ValueError(
                    "the cache has pages and the model's attention_fn no decode option"
                )
            sparse = Step(
                quest=fn.decode,
                mask=masks.pop(0),
                valid=keys >= 0,
                length=cache.length + 1,
            )
        return [masks[w] if w in masks else sparse.at(i) for i, w in enumerate(windows)]

    def _mask_of(self, told: list[Any], positions: Any, keys: Any) -> Any:
        """`(layer, window) -> mask`, both traced, for a scan over the layers."""
        first, mixed = told[0], len(set(self._windows())) > 1

        def mask_of(place: Any) -> Any:
            layer, window = place
            if isinstance(first, Prefill | Step):
                return first.at(layer)
            return attend_mask(positions, keys, window) if mixed else first

        return mask_of


def _with(cache: KVCache, k: Any, v: Any, pages: Any) -> KVCache:
    return dataclasses.replace(cache, k=k, v=v, pages=pages)
