"""`Float8KV`: keys and values in 8 bits, as the tensor cores of Hopper read them.

Numbers are e4m3 with one scale for each head. An 8-bit float has the same relative
precision at every size, so that finer scales (by block, by channel) gain nothing that
can be measured, and scales that are powers of two lose nothing: what they give back is
exact in bfloat16. What does help is to take the mean off the keys, whose channels often
have one (SageAttention, arXiv 2410.02367, section 4.2): it changes all logits of a
query alike, which softmax does not see.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
MOST = 448.0  # the largest e4m3
_LANES = 128  # values are stored for a multiple of so many keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8KV:
    """Keys and values in float8_e4m3fn.

    Attributes:
      k: float8_e4m3fn `[B, S, Hkv, D]`, `(keys - k_mean) / k_scale`.
      v: float8_e4m3fn `[B, Hkv, D, S']`, `values / v_scale` with the keys last, S' the
        next multiple of 128 and zeros from S on. Among each 16 keys, key
        `8 a + 2 b + c` (a and c 0 or 1, b 0 to 3) stands at `4 b + 2 a + c`: a thread
        then holds its weights in the order in which it multiplies them.
      k_scale, v_scale: float32 `[B, Hkv]`.
      k_mean: float32 `[B, Hkv, D]`, or None for keys as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import quantize_kv
      >>> x = jnp.ones((1, 200, 2, 64), jnp.bfloat16)
      >>> kv = quantize_kv(x, x)
      >>> kv.k.shape, kv.v.shape
      ((1, 200, 2, 64), (1, 2, 64, 256))
      >>> bool((kv.keys() == 1).all() & (kv.values() == 1).all())
      True
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    k_mean: jax.Array | None

    def keys(self, dtype: Any = jnp.float32) -> jax.Array:
        """`[B, S, Hkv, D]`: the keys that these numbers stand for."""
        k = self.centred_keys(jnp.float32)
        if self.k_mean is not None:
            k = k + self.k_mean[:, None]
        return k.astype(dtype)

    def centred_keys(self, dtype: Any) -> jax.Array:
        """The keys without their mean; exact in 16 bits."""
        k = self.k.astype(jnp.float32) * self.k_scale[:, None, :, None]
        return k.astype(dtype)

    def values(self, dtype: Any = jnp.float32) -> jax.Array:
        """`[B, S, Hkv, D]`: the values that these numbers stand for."""
        v = in_order(self.v.astype(jnp.float32))[..., : self.k.shape[1]]
        v = v * self.v_scale[..., None, None]
        return v.transpose(0, 3, 1, 2).astype(dtype)


def quantize_kv(
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: int | jax.Array | None = None,
    smooth: bool = True,
) -> Float8KV:
    """Keys and values in float8_e4m3fn.

    Scales and the mean are those of the whole sequence: numbers change a little when it
    grows.

    Args:
      k, v: `[B, S, Hkv, D]`, any floats.
      lengths: real keys of each row of the batch, an integer or int32 `[B]`; what
        stands behind them counts for nothing and becomes 0. Default S.
      smooth: take the mean of the keys of a head off them. Not for attention with a
        `soft_cap`, which does see it.

    Returns:
      A `Float8KV`; see there for the order of the numbers. Not differentiable: casts to
      8 bits are constants nearly everywhere.
    """
    s = k.shape[1]
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    count: Any = jnp.float32(s)
    if lengths is not None:
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), k.shape[:1])
        real = (jnp.arange(s) < lengths[:, None])[..., None, None]
        k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
        count = jnp.maximum(lengths, 1).astype(jnp.float32)[:, None, None]
    mean = None
    if smooth:
        mean = jnp.sum(k, axis=1) / count
        k = k - mean[:, None]
        if lengths is not None:
            k = jnp.where(real, k, 0)
    k, k_scale = _quantize(k, (1, 3))
    v, v_scale = _quantize(v, (1, 3))
    v = jnp.pad(v.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, padded(s) - s)])
    return Float8KV(k, out_of_order(v), k_scale[:, 0, :, 0], v_scale[:, 0, :, 0], mean)


def padded(s: int) -> int:
    """Keys for which `Float8KV.v` has room, of s."""
    return -(-s // _LANES) * _LANES


def quantize_rows(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries `[B, T, H, D]` in float8_e4m3fn, and float32 scales `[B, T, H]`."""
    q, scale = _quantize(q.astype(jnp.float32), (3,))
    return q, scale[..., 0]


def log_shift(q: jax.Array, mean: jax.Array, scale: float) -> jax.Array:
    """float32 `[B, H, T]`: what logits lack where the mean was taken off the keys."""
    batch, t, heads, dim = q.shape
    kv_heads = mean.shape[1]
    q = q.reshape(batch, t, kv_heads, heads // kv_heads, dim).astype(jnp.float32)
    shift = jnp.einsum("btkgd,bkd->bkgt", q, mean, precision="highest")
    return shift.reshape(batch, heads, t) * scale


def out_of_order(v: jax.Array) -> jax.Array:
    """Keys on the last axis, a multiple of 16, in the order of `Float8KV.v`."""
    split = v.reshape(*v.shape[:-1], -1, 2, 4, 2)
    return split.swapaxes(-3, -2).reshape(v.shape)


def in_order(v: jax.Array) -> jax.Array:
    """The inverse of `out_of_order`."""
    split = v.reshape(*v.shape[:-1], -1, 4, 2, 2)
    return split.swapaxes(-3, -2).reshape(v.shape)


def power_of_two(most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least power of two that brings float32 `most` within 448, and its inverse.

    1 for less than 1e-16, which becomes 0.
    """
    bits = jax.lax.bitcast_convert_type(most * (1 / MOST), jnp.int32)
    # Adding all bits of the fraction carries into the exponent unless they are 0.
    bits = (bits + 0x7FFFFF) & 0x7F800000
    bits = jnp.where(bits > (127 - 60) << 23, bits, 127 << 23)
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return scale, jax.lax.bitcast_convert_type((254 << 23) - bits, jnp.float32)


def _quantize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn and float32 scales, which are powers of two."""
    scale, inverse = power_of_two(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    # 1 / MOST is rounded, so that a number may come out just above it.
    return jnp.clip(x * inverse, -MOST, MOST).astype(FLOAT8), scale
