"""`rows_attention` written out for XLA: the reference, and what runs without a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rows_attention._blocks import TOKENS


def attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    held: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(y, k, v)`; see `api.rows_attention`. The mask is int8 `[B, T, S]`."""
    batch, tokens, columns = qkv.shape
    kv_heads, size, features = k.shape[1:]
    heads = columns // features - 2 * kv_heads
    # Products of one size, as another number of tokens may be summed in another order.
    more = ((0, 0), (0, TOKENS - tokens), (0, 0))
    padded = jnp.pad(qkv, more).reshape(batch, TOKENS, -1, features)
    cos, sin, mask = (jnp.pad(x, more) for x in (cos, sin, mask))
    q, new_k, new_v = jnp.split(padded, (heads, heads + kv_heads), axis=2)
    q_norm, k_norm = norms or (None, None)

    def rotated(x: jax.Array, norm: jax.Array | None) -> jax.Array:
        wide = x.astype(jnp.float32)
        if norm is not None:
            square = jnp.mean(wide * wide, axis=-1, keepdims=True)
            wide = (wide * jax.lax.rsqrt(square + eps)).astype(x.dtype)
            wide = (wide * norm.astype(x.dtype)).astype(jnp.float32)
        a, b = jnp.split(wide, 2, axis=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([a * c - b * s, b * c + a * s], -1).astype(x.dtype)

    row, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]

    def put(store: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        """`new [B, Hkv, R, D]` at slots `[B, R]`; those of `size` are left out."""
        where = (row, head, at[:, None, :])
        return store.at[where].set(new.astype(store.dtype), mode="drop")

    if held:
        hk, hv, valid = held
        entry = jnp.arange(hk.shape[2])
        at = (slots - valid)[:, None] + entry
        at = jnp.where(entry < valid[:, None], at, size)
        k, v = put(k, hk, at), put(v, hv, at)
    at = slots[:, None] + jnp.arange(tokens)
    turned = rotated(new_k, k_norm)[:, :tokens]
    k = put(k, jnp.swapaxes(turned, 1, 2), at)
    v = put(v, jnp.swapaxes(new_v[:, :tokens], 1, 2), at)
    y = jax.nn.dot_product_attention(
        rotated(q, q_norm),
        jnp.swapaxes(k, 1, 2).astype(qkv.dtype),
        jnp.swapaxes(v, 1, 2).astype(qkv.dtype),
        mask=mask[:, None] != 0,
    )
    return y[:, :tokens].reshape(batch, tokens, -1), k, v
