"""The parts of Whisper (nnx): norms, attention, MLP, and the layers made of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from angeljax import ops
from angeljax.models._whisper_config import WhisperConfig
from angeljax.models.cache import write
from angeljax.models.layers import Linear

_INIT = nnx.initializers.normal(0.02)
_ONES = nnx.initializers.ones_init()
_ZEROS = nnx.initializers.zeros_init()
_EPS = 1e-5
_UNSEEN = -0.7 * float(np.finfo(np.float32).max)
# Queries of the encoder whose attention weights exist at one time, where all of them
# are asked for: all heads of 128 queries on 1500 keys are 5 MB in the smallest model.
_QUERY_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderAttention:
    """What token reduction needs of one encoder layer's attention, A `[B, H, N, N]`.

    Attributes:
      received_max: float32 `[B, N]`, attention that each token receives: the maximum of
        A over heads, averaged over the real queries.
      received_mean: float32 `[B, N]`, the same of the mean over heads.
      diagonal_max: float32 `[B, N]`, attention of each token to itself, the maximum
        over heads.
      diagonal_mean: float32 `[B, N]`, the same with the mean over heads.
      full: A itself, float32 `[B, H, N, N]`, where asked for; else None.
    """

    received_max: jax.Array
    received_mean: jax.Array
    diagonal_max: jax.Array
    diagonal_mean: jax.Array
    full: jax.Array | None = None


class EncoderSizes(Protocol):
    """What an encoder's layers need to know of a configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def encoder_heads(self) -> int: ...
    @property
    def encoder_ffn_size(self) -> int: ...
    @property
    def num_mel_bins(self) -> int: ...


class CrossKV(NamedTuple):
    """Keys and values of the encoder tokens in one decoder layer, `[B, H, N, D]`."""

    k: jax.Array
    v: jax.Array


class SelfKV(NamedTuple):
    """Keys and values of the tokens read so far in one layer, `[R, H, slots, D]`."""

    k: jax.Array
    v: jax.Array


class LayerNorm(nnx.Module):
    """Layer normalisation with statistics in float32 (arXiv 1607.06450)."""

    def __init__(self, size: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(_ONES(rngs.params(), (size,), dtype))
        self.bias = nnx.Param(_ZEROS(rngs.params(), (size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        centred = wide - mean
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + _EPS)
        y = y * self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Conv(nnx.Module):
    """Convolution of width 3 over time, kernel `[3, in, out]`, one frame of padding."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(_INIT(rngs.params(), (3, n_in, n_out), dtype))
        self.bias = nnx.Param(_ZEROS(rngs.params(), (n_out,), dtype))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, in]` to `[B, ceil(T / stride), out]`."""
        # As a product of patches with the kernel, so that it may be a packed one.
        steps = -(-x.shape[1] // self.stride)
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        at = np.arange(steps)[:, None] * self.stride + np.arange(3)
        y = ops.einsum("btki,kio->bto", padded[:, at], self.kernel[...])
        return y + self.bias[...].astype(y.dtype)


class Attention(nnx.Module):
    """Multi-head attention without positions; the keys have no bias."""

    def __init__(self, size: int, heads: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, size, size, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj = make(bias=True), make(bias=False)
        self.v_proj, self.out_proj = make(bias=True), make(bias=True)
        self.heads = heads

    def queries(self, x: jax.Array) -> jax.Array:
        """Scaled queries `[B, T, H, D]`."""
        q = self._heads(self.q_proj(x))
        return q * q.shape[-1] ** -0.5

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values, `[B, T, H, D]`."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def join(self, y: jax.Array, residual: jax.Array) -> jax.Array:
        """`residual + out_proj(heads side by side)`."""
        y = y.reshape(*residual.shape[:-1], -1)
        return self.out_proj(y, residual=residual)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class MLP(nnx.Module):
    """`x + fc2(gelu(fc1(norm(x))))`."""

    def __init__(self, size: int, inner: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.fc1, self.fc2 = make(size, inner), make(inner, size)

    def __call__(self, x: jax.Array, norm: LayerNorm) -> jax.Array:
        inner = jax.nn.gelu(self.fc1(norm(x)), approximate=False)
        return self.fc2(inner, residual=x)


class EncoderLayer(nnx.Module):
    """Self-attention of all tokens on all, and an MLP."""

    def __init__(self, c: EncoderSizes, *, dtype: Any, rngs: nnx.Rngs) -> None:
        norm = functools.partial(LayerNorm, c.hidden_size, dtype=dtype, rngs=rngs)
        around = {"dtype": dtype, "rngs": rngs}
        self.self_attn = Attention(c.hidden_size, c.encoder_heads, **around)
        self.self_attn_layer_norm, self.final_layer_norm = norm(), norm()
        self.mlp = MLP(c.hidden_size, c.encoder_ffn_size, **around)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Of `[B, N, D]`; mask as in `attend`."""
        y = self.self_attn_layer_norm(x)
        q, (k, v) = self.self_attn.queries(y), self.self_attn.keys_values(y)
        x = self.self_attn.join(attend(q, k, v, mask), x)
        return self.mlp(x, self.final_layer_norm)

    def attention(
        self, x: jax.Array, real: jax.Array | None, *, full: bool
    ) -> EncoderAttention:
        """The layer's attention weights on its input `x`, summarised."""
        return summarise(*self.queries_keys(x), real, full=full)

    def queries_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scaled queries and keys `[B, N, H, D]` of the layer's input `x`."""
        y = self.self_attn_layer_norm(x)
        return self.self_attn.queries(y), self.self_attn.keys_values(y)[0]


class DecoderLayer(nnx.Module):
    """Causal self-attention with a cache, cross-attention, and an MLP."""

    def __init__(self, c: WhisperConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        norm = functools.partial(LayerNorm, c.hidden_size, dtype=dtype, rngs=rngs)
        around = {"dtype": dtype, "rngs": rngs}
        self.self_attn = Attention(c.hidden_size, c.decoder_heads, **around)
        self.self_attn_layer_norm = norm()
        self.encoder_attn = Attention(c.hidden_size, c.decoder_heads, **around)
        self.encoder_attn_layer_norm = norm()
        self.mlp = MLP(c.hidden_size, c.decoder_ffn_size, **around)
        self.final_layer_norm = norm()

    def __call__(
        self,
        x: jax.Array,
        seen: jax.Array,
        slot: jax.Array | int,
        kv: SelfKV,
        cross: CrossKV,
        real: jax.Array,
    ) -> tuple[jax.Array, SelfKV]:
        """New tokens `[R, T, D]`; R is a multiple of the batch of `cross`.

        Rows of one batch entry stand together (the beams of a search) and look at the
        same encoder tokens, which are therefore not repeated.
        """
        y = self.self_attn_layer_norm(x)
        q, (k, v) = self.self_attn.queries(y), self.self_attn.keys_values(y)
        kv = SelfKV(_write(kv.k, k, slot), _write(kv.v, v, slot))
        x = self.self_attn.join(_attend_stored(q, kv.k, kv.v, seen), x)

        q = self.encoder_attn.queries(self.encoder_attn_layer_norm(x))
        batch, (_, _, heads, dim) = cross.k.shape[0], q.shape
        together = q.reshape(batch, -1, heads, dim)
        y = _attend_stored(together, *cross, real[:, None, None, :])
        x = self.encoder_attn.join(y.reshape(q.shape), x)
        return self.mlp(x, self.final_layer_norm), kv

    def cross(self, features: jax.Array) -> CrossKV:
        """What cross-attention reads of encoder tokens `[B, N, D]`."""
        k, v = self.encoder_attn.keys_values(features)
        return CrossKV(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Softmax attention with queries that are scaled already; softmax in float32.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, S, H, D]`.
      mask: bool, broadcasts to `[B, 1, T, S]`, True where a query sees a key.

    Returns:
      `[B, T, H, D]` in the dtype of `v`.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0)


def _attend_stored(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention on stored keys and values; softmax in float32.

    Heads come before slots: the products are then batched over leading axes, and a step
    reads what is stored once, without a transposed copy of it.

    Args:
      q: `[B, T, H, D]`, scaled already.
      k, v: `[B, H, S, D]`.
      mask: bool, broadcasts to `[B, 1, T, S]`, True where a query sees a key.

    Returns:
      `[B, T, H, D]` in the dtype of `q`.
    """
    q = jnp.swapaxes(q, 1, 2)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    # Finite, so that a row that sees nothing gives no NaN.
    scores = jnp.where(mask, scores, _UNSEEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bhts,bhsd->bhtd", weights, v)
    return jnp.swapaxes(y, 1, 2).astype(q.dtype)


def summarise(
    q: jax.Array, k: jax.Array, real: jax.Array | None, *, full: bool
) -> EncoderAttention:
    """Attention weights of scaled queries on keys, a block of queries at a time.

    Args:
      q, k: `[B, N, H, D]`.
      real: bool `[B, N]`, queries that count; default all.
      full: also give the weights themselves.

    Returns:
      `EncoderAttention`. Without `full` no array larger than the weights of 128
      queries is made.
    """
    batch, n, heads, dim = q.shape
    real = jnp.ones((batch, n), bool) if real is None else real
    blocks = -(-n // _QUERY_BLOCK)
    fill = blocks * _QUERY_BLOCK - n
    # Blocks first: [blocks, B, 128, ...].
    q = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, blocks, _QUERY_BLOCK, heads, dim), 1, 0)
    counted = jnp.pad(real, ((0, 0), (0, fill))).astype(jnp.float32)
    counted = jnp.moveaxis(counted.reshape(batch, blocks, _QUERY_BLOCK), 1, 0)

    def step(carry: Any, block: Any) -> tuple[Any, Any]:
        number, queries, weight = block
        scores = jnp.einsum(
            "bqhd,bshd->bhqs", queries, k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores, axis=-1)
        over_heads = jnp.max(weights, axis=1), jnp.mean(weights, axis=1)  # [B, q, N]
        received = [jnp.einsum("bqs,bq->bs", x, weight) for x in over_heads]
        at = number * _QUERY_BLOCK + jnp.arange(_QUERY_BLOCK)
        at = jnp.minimum(at, n - 1)[None, :, None]
        own = [jnp.take_along_axis(x, at, axis=2)[..., 0] for x in over_heads]
        sums = jax.tree.map(jnp.add, carry, tuple(received))
        return sums, (tuple(own), weights if full else None)

    zero = jnp.zeros((batch, n), jnp.float32)
    order = jnp.arange(blocks), q, counted
    (most, mean), (own, weights) = jax.lax.scan(step, (zero, zero), order)
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1).astype(jnp.float32)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :n]

    if full:
        weights = jnp.moveaxis(weights, 0, 2).reshape(batch, heads, -1, n)[:, :, :n]
    return EncoderAttention(
        received_max=most / count,
        received_mean=mean / count,
        diagonal_max=joined(own[0]),
        diagonal_mean=joined(own[1]),
        full=weights,
    )


def sinusoids(length: int, size: int) -> np.ndarray:
    """Positions of the encoder, float32 `[length, size]`: sines, then cosines."""
    steps = np.log(10000.0) / (size // 2 - 1)
    angles = np.arange(length)[:, None] * np.exp(-steps * np.arange(size // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _write(store: jax.Array, new: jax.Array, slot: jax.Array | int) -> jax.Array:
    if jnp.ndim(slot):  # rows that stand at different places
        return cast(jax.Array, write(store, new, jnp.asarray(slot))[0])
    new = jnp.swapaxes(new, 1, 2).astype(store.dtype)
    return jax.lax.dynamic_update_slice(store, new, (0, 0, slot, 0))
