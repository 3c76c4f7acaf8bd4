"""Dense weights of canonical planes: what every implementation is measured against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._weights import Planes, WeightLayout, scales

# QLoRA (arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# OCP Microscaling Formats v1.0, table of E2M1.
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def codes(planes: Planes, layout: WeightLayout) -> jax.Array:
    """Codes as numbers, `[K, N]`: int8 for integer formats (asymmetric ones with their
    zero subtracted: int16), else the float32 elements."""
    stored, k = planes["codes"], layout.k
    if layout.format == "t2":
        runs = stored.reshape(-1, 1, layout.run // 4, layout.n)
        shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
        values = ((runs >> shift) & 3).astype(jnp.int8) - 1
        return values.reshape(-1, layout.n)[:k]
    if layout.format == "sherry":
        return _parity(stored, planes["high"], layout)[:k]
    if layout.per_byte == 2:
        pair = jnp.stack([stored & 15, stored >> 4], axis=1)
        nibbles = pair.reshape(-1, layout.n)[:k]
        if layout.format == "int4" and layout.symmetric:
            return (nibbles << 4).astype(jnp.int8) >> 4
        if layout.format == "int4":
            return _less_zero(nibbles, planes, layout)
        levels: tuple[float, ...] = NF4_LEVELS
        if layout.format != "nf4":
            levels = (*E2M1_LEVELS, *(-v for v in E2M1_LEVELS))
        table = jnp.asarray(levels, jnp.float32)
        return jnp.take(table, nibbles, mode="clip")
    if layout.format == "int8":
        stored = stored[:k]
        return stored if layout.symmetric else _less_zero(stored, planes, layout)
    return stored[:k].astype(jnp.float32)


def _less_zero(q: jax.Array, planes: Planes, layout: WeightLayout) -> jax.Array:
    zero = jnp.repeat(planes["zero"], layout.group_size, axis=0)[: layout.k]
    return q.astype(jnp.int16) - zero.astype(jnp.int16)


def _parity(signs: jax.Array, high: jax.Array, layout: WeightLayout) -> jax.Array:
    words = signs.reshape(-1, 4, layout.n)
    parity = words[:, 0] ^ words[:, 1] ^ words[:, 2] ^ words[:, 3]
    zero = jnp.stack(
        [
            (high if p >= 2 else ~high) & (parity if p % 2 else ~parity)
            for p in range(4)
        ],
        axis=1,
    )
    shift = jnp.arange(8, dtype=jnp.uint8)[:, None, None, None]
    negative = ((words >> shift) & 1).astype(jnp.int8)  # [group, word, lane, N]
    empty = ((zero >> shift) & 1).astype(jnp.int8)
    values = (1 - 2 * negative) * (1 - empty)
    if layout.group_stride == 1:
        values = values.transpose(1, 0, 2, 3)  # k = 32 word + 4 group + lane
    else:  # k = 64 run + 16 lane + 8 half + group
        values = values.reshape(8, -1, 2, 4, layout.n).transpose(1, 3, 2, 0, 4)
    return values.reshape(-1, layout.n)


def dense(planes: Planes, layout: WeightLayout, dtype: Any = jnp.float32) -> jax.Array:
    """The weight `[K, N]`: codes times scales in float32, then rounded to `dtype`."""
    scale = jnp.repeat(scales(planes, layout), layout.group_size, axis=0)
    return (codes(planes, layout) * scale[: layout.k]).astype(dtype)
