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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.models.config import DecoderConfig
from angeljax.models.rope import cos_sin, rotate

# (q [B,T,H,D], k [B,S,Hkv,D], v [B,S,Hkv,D], mask bool [B,1,T,S]) -> [B,T,H,D]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
_INIT = nnx.initializers.normal(0.02)
_ONES = nnx.initializers.ones_init()
_ZEROS = nnx.initializers.zeros_init()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of what was read so far; a pytree of static shapes.

    Attributes:
      k, v: `[layers, B, slots, num_kv_heads, head_dim]`, keys after rotation.
      positions: int32 `[B, slots]`, position of each slot, -1 for padding and for
        slots that are not filled.
      length: int32 scalar, slots that are filled.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    length: jax.Array


def init_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.bfloat16
) -> KVCache:
    """An empty cache.

    Args:
      config: of the model.
      batch: rows.
      slots: tokens that a row can hold, prompt and padding included.
      dtype: of keys and values.

    Returns:
      A `KVCache` of zeros, length 0.
    """
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention with grouped queries; softmax in float32.

    Args:
      q: `[B, T, num_heads, head_dim]`.
      k, v: `[B, S, num_kv_heads, head_dim]`.
      mask: bool `[B, 1, T, S]`, True where a query sees a key.

    Returns:
      `[B, T, num_heads, head_dim]`.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, kernel `[in, out]`."""

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(_INIT(rngs.params(), (n_in, n_out), dtype))
        self.bias = nnx.Param(_ZEROS(rngs.params(), (n_out,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.dot(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(_ONES(rngs.params(), (size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * h.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional cache."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        make = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.q_proj = make(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = make(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = make(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = make(q, c.hidden_size, bias=c.output_bias)
        norm = functools.partial(RMSNorm, c.head_dim, c.norm_eps, rngs=rngs)
        self.q_norm = norm(dtype=dtype) if c.qk_norm else None
        self.k_norm = norm(dtype=dtype) if c.qk_norm else None
        self.heads, self.kv_heads, self.head_dim = (
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
        )

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        slot: jax.Array | None,
        attention_fn: AttentionFn,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        b, t, _ = x.shape
        q = self.q_proj(x).reshape(b, t, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(b, t, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(b, t, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None and slot is not None:
            at = (0, slot, 0, 0)
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), at)
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), at)
        y = attention_fn(q, k.astype(q.dtype), v.astype(q.dtype), mask)
        return self.o_proj(y.reshape(b, t, -1)), (k, v)


class MLP(nnx.Module):
    """Gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        self.gate_proj = make(c.hidden_size, c.intermediate_size)
        self.up_proj = make(c.hidden_size, c.intermediate_size)
        self.down_proj = make(c.intermediate_size, c.hidden_size)
        self.activation = c.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate_proj(x)
        if self.activation == "silu":
            gate = jax.nn.silu(gate)
        else:
            gate = jax.nn.gelu(gate, approximate=self.activation != "gelu")
        return self.down_proj(gate * self.up_proj(x))


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and beside a residual."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        norm = functools.partial(
            RMSNorm, c.hidden_size, c.norm_eps, dtype=dtype, rngs=rngs
        )
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(c, dtype=dtype, rngs=rngs)
        self.mlp = MLP(c, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
        y, kv = self.attn(self.attn_norm(x), *args)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv


class Embed(nnx.Module):
    """Token embedding `[vocab, hidden]`, also the tied head."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        shape = (c.vocab_size, c.hidden_size)
        self.embedding = nnx.Param(_INIT(rngs.params(), shape, dtype))


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
    ) -> None:
        self.config, self.dtype, self.scan_layers = config, dtype, scan_layers
        self.attention_fn = attention_fn
        make = functools.partial(Block, config, dtype=param_dtype)
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
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        seen = 0 if cache is None else jnp.max(cache.positions, -1, keepdims=True) + 1
        count = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1 + seen
        positions = jnp.where(mask, count, -1)
        keys = positions
        if cache is not None:
            at = (0, cache.length)
            keys = jax.lax.dynamic_update_slice(cache.positions, positions, at)
        rotation = cos_sin(self.config, jnp.maximum(positions, 0))
        x = ops.embed(self.embed_tokens.embedding[...], tokens, dtype=self.dtype)
        run = self._scan if self.scan_layers else self._loop
        x, kv = run(x, rotation, positions, keys, cache)
        if last_only:
            x = x[:, -1:]
        logits = self.head(self.norm(x))
        if cache is None:
            return logits, None
        length = cache.length + tokens.shape[1]
        return logits, KVCache(k=kv[0], v=kv[1], positions=keys, length=length)

    def head(self, x: jax.Array) -> jax.Array:
        """float32 logits of normalised hidden states."""
        if self.lm_head is None:
            return ops.attend(x, self.embed_tokens.embedding[...])
        return ops.dot(x, self.lm_head.kernel[...], preferred_element_type=jnp.float32)

    def _windows(self) -> list[int]:
        return list(self.config.windows) or [0] * self.config.num_layers

    def _loop(
        self, x: Any, rotation: Any, positions: Any, keys: Any, cache: KVCache | None
    ) -> tuple[Any, Any]:
        ks, vs = [], []
        masks = {w: _attend_mask(positions, keys, w) for w in set(self._windows())}
        slot = None if cache is None else cache.length
        for i, (layer, window) in enumerate(
            zip(self.layers, self._windows(), strict=True)
        ):
            kv = None if cache is None else (cache.k[i], cache.v[i])
            x, (k, v) = layer(x, rotation, masks[window], kv, slot, self.attention_fn)
            ks.append(k)
            vs.append(v)
        return x, None if cache is None else (jnp.stack(ks), jnp.stack(vs))

    def _scan(
        self, x: Any, rotation: Any, positions: Any, keys: Any, cache: KVCache | None
    ) -> tuple[Any, Any]:
        graphdef, state = nnx.split(self.layers)
        slot = None if cache is None else cache.length
        mixed = len(set(self._windows())) > 1
        windows = jnp.asarray(self._windows(), jnp.int32) if mixed else None
        shared = None if mixed else _attend_mask(positions, keys, self._windows()[0])

        def step(h: Any, layer: Any) -> tuple[Any, Any]:
            state, kv, window = layer
            mask = _attend_mask(positions, keys, window) if mixed else shared
            block = nnx.merge(graphdef, state)
            h, kv = block(h, rotation, mask, kv, slot, self.attention_fn)
            # Without a cache the keys of all layers would be kept for nothing.
            return h, kv if cache is not None else None

        kv = None if cache is None else (cache.k, cache.v)
        return jax.lax.scan(step, x, (state, kv, windows))


def _attend_mask(queries: jax.Array, keys: jax.Array, window: Any) -> jax.Array:
    """bool `[B, 1, T, S]`: which key each query sees; window 0 sees all before it."""
    distance = queries[:, :, None] - keys[:, None, :]
    seen = (keys[:, None, :] >= 0) & (distance >= 0)
    near = (distance < window) | (jnp.asarray(window) == 0)
    return (seen & near)[:, None]
