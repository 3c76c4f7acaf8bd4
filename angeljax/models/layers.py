"""The parts of a decoder layer (nnx): products, norms, attention and the gated MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.attention.decode import Step
from angeljax.attention.prefill import Prefill
from angeljax.attention.quest import update_pages
from angeljax.models.cache import Store, kept, write
from angeljax.models.config import DecoderConfig
from angeljax.models.rope import rotate
from pallas_kernels._fused import before

# (q [B,T,H,D], k [B,S,Hkv,D], v [B,S,Hkv,D], mask bool [B,1,T,S]) -> [B,T,H,D]
# Sparse attention is told a `Prefill` instead of a mask.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
_INIT = nnx.initializers.normal(0.02)
_ONES = nnx.initializers.ones_init()
_ZEROS = nnx.initializers.zeros_init()


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, kernel `[in, out]`."""

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(_INIT(rngs.params(), (n_in, n_out), dtype))
        self.bias = nnx.Param(_ZEROS(rngs.params(), (n_out,), dtype)) if bias else None

    def __call__(self, x: jax.Array, **around: Any) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return ops.dot(x, self.kernel[...], bias=bias, **around)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(_ONES(rngs.params(), (size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return before(x, self.scale[...], self.eps, None)

    @property
    def fused(self) -> dict[str, Any]:
        """The norm as arguments of the product that follows."""
        return {"norm": self.scale[...], "norm_eps": self.eps}


class LayerNorm(nnx.Module):
    """Layer normalisation with statistics in float32 (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(_ONES(rngs.params(), (size,), dtype))
        self.bias = nnx.Param(_ZEROS(rngs.params(), (size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional cache."""

    def __init__(
        self, c: DecoderConfig, *, fused: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        make = functools.partial(Linear, dtype=dtype, rngs=rngs)
        if fused:
            self.qkv_proj = make(c.hidden_size, q + 2 * kv, bias=c.attention_bias)
        else:
            self.q_proj = make(c.hidden_size, q, bias=c.attention_bias)
            self.k_proj = make(c.hidden_size, kv, bias=c.attention_bias)
            self.v_proj = make(c.hidden_size, kv, bias=c.attention_bias)
        self.fused, self.widths = fused, (q, kv)
        self.o_proj = make(q, c.hidden_size, bias=c.output_bias)
        norm = functools.partial(RMSNorm, c.head_dim, c.norm_eps, rngs=rngs)
        self.q_norm = norm(dtype=dtype) if c.qk_norm else None
        self.k_norm = norm(dtype=dtype) if c.qk_norm else None
        self.heads, self.kv_heads, self.head_dim = (
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
        )

    def project(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], norm: RMSNorm
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, T, heads, head_dim]` of `norm(x)`, rotated."""
        b, t, _ = x.shape
        if self.fused:
            n_q, n_kv = self.widths
            qkv = self.qkv_proj(x, **norm.fused)
            q, k, v = jnp.split(qkv, (n_q, n_q + n_kv), axis=-1)
        else:
            x = norm(x)
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.reshape(b, t, self.heads, self.head_dim)
        k = k.reshape(b, t, self.kv_heads, self.head_dim)
        v = v.reshape(b, t, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rotation), rotate(k, *rotation), v

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array | Prefill | Step,
        cache: Store | None,
        attention_fn: AttentionFn,
        *,
        norm: RMSNorm,
    ) -> tuple[jax.Array, Store | None]:
        """`x + attention(norm(x))`, and the cache with the new tokens."""
        residual = x
        b, t, _ = x.shape
        q, k, v = self.project(x, rotation, norm)
        if cache is not None:
            own = kept(cache.k, k, cache.layer), kept(cache.v, v, cache.layer)
            pages = cache.pages
            if pages is not None:
                pages = update_pages(
                    pages, own[0], cache.slot, valid=cache.real, layer=cache.layer
                )
            k_store, k = write(cache.k, k, cache.slot, cache.layer)
            v_store, v = write(cache.v, v, cache.slot, cache.layer)
            cache = cache._replace(k=k_store, v=v_store, pages=pages)
            if isinstance(mask, Prefill) and mask.start == 0:
                k, v = own  # nothing else is in the cache
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        if isinstance(mask, Step):
            assert cache is not None, "only a cache has pages"
            dense = functools.partial(attention_fn, q, k, v, mask.mask)
            keys: Any = cache.k  # arrays: a quantized cache has no pages
            values: Any = cache.v
            y = mask.attend(q, keys, values, cache.pages, cache.layer, dense)
        else:
            y = attention_fn(q, k, v, mask)
        return self.o_proj(y.reshape(b, t, -1), residual=residual), cache


class MLP(nnx.Module):
    """Gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(
        self, c: DecoderConfig, *, fused: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        make = functools.partial(Linear, bias=c.mlp_bias, dtype=dtype, rngs=rngs)
        if fused:
            self.gate_up_proj = make(c.hidden_size, 2 * c.intermediate_size)
        else:
            self.gate_proj = make(c.hidden_size, c.intermediate_size)
            self.up_proj = make(c.hidden_size, c.intermediate_size)
        self.down_proj = make(c.intermediate_size, c.hidden_size)
        self.activation, self.fused = c.activation, fused

    def __call__(self, x: jax.Array, norm: RMSNorm) -> jax.Array:
        """`x + mlp(norm(x))`."""
        residual = x
        if self.fused:
            both = self.gate_up_proj(x, **norm.fused)
            if self.activation == "silu":
                return self.down_proj(both, gate="silu", residual=residual)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            x = norm(x)
            gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            gate = jax.nn.silu(gate)
        else:
            gate = jax.nn.gelu(gate, approximate=self.activation != "gelu")
        return self.down_proj(gate * up, residual=residual)


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and beside a residual."""

    def __init__(
        self, c: DecoderConfig, *, fused: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(
            RMSNorm, c.hidden_size, c.norm_eps, dtype=dtype, rngs=rngs
        )
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(c, fused=fused, dtype=dtype, rngs=rngs)
        self.mlp = MLP(c, fused=fused, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any) -> tuple[jax.Array, Store | None]:
        x, cache = self.attn(x, *args, norm=self.attn_norm)
        return self.mlp(x, self.mlp_norm), cache


class Embed(nnx.Module):
    """Token embedding `[vocab, hidden]`, also the tied head."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        shape = (c.vocab_size, c.hidden_size)
        self.embedding = nnx.Param(_INIT(rngs.params(), shape, dtype))
