"""One decoder-only transformer (nnx) for Llama, Mistral, Qwen2, Qwen3 and SmolLM.

Every product with a weight goes through `angeljax.ops`, so that a compressed tree runs
from its packed planes. Parameters lie under names such as
`layers/0/attn/q_proj/kernel`, kernels are `[in, out]`, and with `scan_layers` the
layers are one stack (`layers/attn/q_proj/kernel`, leading layer axis) that compiles
once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.models import features
from angeljax.models.attention import causal_attention, dense_attention
from angeljax.models.cache import KVCache
from angeljax.models.config import DecoderConfig
from angeljax.models.layers import (
    AttentionFn,
    Block,
    Embed,
    Linear,
    RMSNorm,
)
from angeljax.models.rope import cos_sin


class Decoder(nnx.Module):
    """The language model.

    Args:
      config: sizes and switches.
      rngs: for the initial parameters.
      dtype: of activations.
      param_dtype: of the parameters.
      scan_layers: keep the layers as one stack and scan over it. Compiles in a fraction
        of the time; all layers then share one format.
      attention_fn: replaces softmax attention; see `AttentionFn`.
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
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Next-token logits.

        Args:
          tokens: int32 `[B, T]`.
          mask: bool `[B, T]`, True for real tokens; padding may stand on either side.
          cache: continue after what it holds; T more slots must be free.
          last_only: give the logits of the last position only, `[B, 1, V]`.

        Returns:
          float32 logits `[B, T, V]`, and the cache with the new keys and values (None
          without a cache).
        """
        attention_fn = self._attention(mask, cache)
        x, rotation, positions, keys = self._enter(tokens, mask, cache)
        run = self._scan if self.scan_layers else self._loop
        x, kv = run(x, rotation, positions, keys, cache, attention_fn)
        if last_only:
            x = x[:, -1:]
        logits = self.head(self.norm(x))
        if cache is None:
            return logits, None
        length = cache.length + tokens.shape[1]
        return logits, KVCache(k=kv[0], v=kv[1], positions=keys, length=length)

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
        x, rotation, positions, keys = self._enter(tokens, mask, None)
        around = (self._attention(mask, None), wanted, inside, remat)
        windows = self._windows()
        masks = {w: _attend_mask(positions, keys, w) for w in sorted(set(windows))}
        if self.scan_layers:
            one = masks[windows[0]] if len(masks) == 1 else None

            def mask_of(window: Any) -> jax.Array:
                return _attend_mask(positions, keys, window) if one is None else one

            order = jnp.asarray(windows, jnp.int32)
            found = features.scan(self.layers, x, rotation, mask_of, order, *around)
        else:
            each = [masks[w] for w in windows]
            found = features.loop(list(self.layers), x, rotation, each, *around)
        return features.Features(self.norm(found[0]), *found[1:])

    def _enter(
        self, tokens: jax.Array, mask: jax.Array | None, cache: KVCache | None
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
        """Embedded tokens, rotation, positions of the tokens and of all keys."""
        seen = 0 if cache is None else jnp.max(cache.positions, -1, keepdims=True) + 1
        if mask is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            positions = positions.astype(jnp.int32) + seen
        else:
            count = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1 + seen
            positions = jnp.where(mask, count, -1)
        keys = positions
        if cache is not None:
            at = (0, cache.length)
            keys = jax.lax.dynamic_update_slice(cache.positions, positions, at)
        rotation = cos_sin(self.config, jnp.maximum(positions, 0))
        x = ops.embed(self.embed_tokens.embedding[...], tokens, dtype=self.dtype)
        return x, rotation, positions, keys

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
        return self.attention_fn

    def _windows(self) -> list[int]:
        return list(self.config.windows) or [0] * self.config.num_layers

    def _loop(
        self,
        x: Any,
        rotation: Any,
        positions: Any,
        keys: Any,
        cache: KVCache | None,
        attention_fn: AttentionFn,
    ) -> tuple[Any, Any]:
        masks = {w: _attend_mask(positions, keys, w) for w in set(self._windows())}
        kv: Any = None if cache is None else (cache.k, cache.v)
        apart: list[Any] = []
        for i, (layer, window) in enumerate(
            zip(self.layers, self._windows(), strict=True)
        ):
            store: Any = None
            if cache is not None and isinstance(cache.k, tuple):
                store = cache.k[i], cache.v[i], cache.length, None
            elif cache is not None:
                store = *kv, cache.length, i
            x, kv = layer(x, rotation, masks[window], store, attention_fn)
            apart.append(kv)
        if cache is not None and isinstance(cache.k, tuple):
            kv = tuple(k for k, _ in apart), tuple(v for _, v in apart)
        return x, kv

    def _scan(
        self,
        x: Any,
        rotation: Any,
        positions: Any,
        keys: Any,
        cache: KVCache | None,
        attention_fn: AttentionFn,
    ) -> tuple[Any, Any]:
        graphdef, state = nnx.split(self.layers)
        mixed = len(set(self._windows())) > 1
        windows = jnp.asarray(self._windows(), jnp.int32) if mixed else None
        shared = None if mixed else _attend_mask(positions, keys, self._windows()[0])

        def step(carry: Any, layer: Any) -> tuple[Any, None]:
            # The cache is carried: as an input and output of the scan it would be
            # copied whole.
            h, kv = carry
            state, window, i = layer
            store = None if cache is None else (*kv, cache.length, i)
            mask = _attend_mask(positions, keys, window) if mixed else shared
            block = nnx.merge(graphdef, state)
            return block(h, rotation, mask, store, attention_fn), None

        kv: Any = None if cache is None else (cache.k, cache.v)
        apart = cache is not None and isinstance(cache.k, tuple)
        kv = tuple(map(jnp.stack, kv)) if apart else kv
        numbers = jnp.arange(self.config.num_layers)
        (x, kv), _ = jax.lax.scan(step, (x, kv), (state, windows, numbers))
        return x, tuple(map(jnp.unstack, kv)) if apart else kv


def _attend_mask(queries: jax.Array, keys: jax.Array, window: Any) -> jax.Array:
    """bool `[B, 1, T, S]`: which key each query sees; window 0 sees all before it."""
    distance = queries[:, :, None] - keys[:, None, :]
    seen = (keys[:, None, :] >= 0) & (distance >= 0)
    near = (distance < window) | (jnp.asarray(window) == 0)
    return (seen & near)[:, None]
