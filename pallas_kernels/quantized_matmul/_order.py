"""The order `hopper` of 8- and 4-bit planes: operands of `mma.m16n8k32` on bytes.

A tile is 16 outputs x 128 weights along K, in four steps of 32. Lane 4g + q holds four
words of a step: word h + 2b has outputs g + 8h and k = 16 b + 4 q + p in byte p. For
4-bit codes one word holds two steps, the even one in the low nibbles.

  plane   shape                                holds
  codes   int32 [N/16, K/128, 4 or 2, 32, 4]   integers signed
  scale   one for each output: float32 [N']; for groups: int32 [N/16, T, 8, P] of
          bfloat16 pairs or float32 [N/16, T, 8, P, 2], outputs g and g + 8; P groups in
          a tile and T tiles, or P = 1 and T groups of a tile or more
  zero    float32 [N/16, T, 8, P, 2], as the operand counts it
  scale2  float32 [N'] (nvfp4)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._hopper_operands import FACTOR, ROWS, TILE
from pallas_kernels._weights import CANONICAL, Planes, WeightLayout

ORDER = "hopper"


def tiles(layout: WeightLayout) -> tuple[int, int]:
    """Row blocks of 16 outputs, tiles of 128 along K; both even for the big product."""
    return -(-layout.n // 128) * 8, -(-layout.k // (2 * TILE)) * 2


def grouped(layout: WeightLayout) -> bool:
    """Whether scales are applied inside the sum."""
    return layout.groups > 1 or not layout.symmetric


def to_hopper(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Canonical planes `[*, N]` into fragments."""
    codes = planes["codes"]
    if layout.per_byte == 2:
        nibbles = jnp.stack([codes & 15, codes >> 4], axis=1).reshape(-1, layout.n)
        if not layout.symmetric:
            nibbles = nibbles ^ 8
        out = {"codes": _nibble_words(nibbles, layout)}
    else:
        stored = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        if not layout.symmetric:
            stored = stored ^ 128
        out = {"codes": _words(_blocks(stored, layout))}
    out["scale"] = _scales_to(planes["scale"], layout)
    if not layout.symmetric:
        middle = 8 if layout.per_byte == 2 else 128
        zero = (planes["zero"].astype(jnp.float32) - middle) * FACTOR[layout.format]
        out["zero"] = _pairs(zero, layout)
    if layout.format == "nvfp4":
        blocks = tiles(layout)[0]
        out["scale2"] = jnp.broadcast_to(planes["scale2"][0], (blocks * ROWS,))
    dtype = jnp.dtype(planes["scale"].dtype).name
    return out, layout.replace(order=ORDER, scale_dtype=dtype)


def from_hopper(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Inverse of `to_hopper`, padding cut off."""
    if layout.per_byte == 2:
        nibbles = _from_nibble_words(planes["codes"], layout)
        if not layout.symmetric:
            nibbles = nibbles ^ 8
        pairs = nibbles.reshape(-1, 2, layout.n)
        codes = pairs[:, 0] | (pairs[:, 1] << 4)
    else:
        codes = _from_blocks(_bytes(planes["codes"]), layout)
        if not layout.symmetric:
            codes = codes ^ 128
        codes = jax.lax.bitcast_convert_type(codes, _code_dtype(layout))
    out = {"codes": codes, "scale": _scales_from(planes["scale"], layout)}
    if not layout.symmetric:
        middle = 8 if layout.per_byte == 2 else 128
        zero = _unpairs(planes["zero"], layout) / FACTOR[layout.format] + middle
        out["zero"] = zero.astype(jnp.uint8)
    if layout.format == "nvfp4":
        out["scale2"] = planes["scale2"][:1][None]
    return out, layout.replace(order=CANONICAL, scale_dtype="")


def _code_dtype(layout: WeightLayout) -> jnp.dtype:
    if layout.format == "int8":
        return jnp.dtype(jnp.int8 if layout.symmetric else jnp.uint8)
    e5m2 = layout.format == "float8_e5m2"
    return jnp.dtype(jnp.float8_e5m2 if e5m2 else jnp.float8_e4m3fn)


def _blocks(x: jax.Array, layout: WeightLayout) -> jax.Array:
    """uint8 `[K, N]` -> `[N/16, K/128, step 4, lane 32, word 4, byte 4]`."""
    blocks, k_tiles = tiles(layout)
    x = jnp.pad(x, ((0, k_tiles * TILE - x.shape[0]), (0, blocks * ROWS - x.shape[1])))
    x = x.reshape(k_tiles, 4, 2, 4, 4, blocks, 2, 8)  # t s b q p | nb h g
    x = x.transpose(5, 0, 1, 7, 3, 2, 6, 4)  # nb t s g q b h p
    return x.reshape(blocks, k_tiles, 4, 32, 4, 4)


def _from_blocks(x: jax.Array, layout: WeightLayout) -> jax.Array:
    blocks, k_tiles = tiles(layout)
    x = x.reshape(blocks, k_tiles, 4, 8, 4, 2, 2, 4)  # nb t s g q b h p
    x = x.transpose(1, 2, 5, 4, 7, 0, 6, 3)  # t s b q p nb h g
    x = x.reshape(k_tiles * TILE, blocks * ROWS)
    rows = -(-layout.k // layout.per_byte) * layout.per_byte
    return x[:rows, : layout.n]


def _words(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _nibble_words(nibbles: jax.Array, layout: WeightLayout) -> jax.Array:
    x = _blocks(nibbles, layout)
    return _words(x[:, :, 0::2] | (x[:, :, 1::2] << 4))


def _from_nibble_words(words: jax.Array, layout: WeightLayout) -> jax.Array:
    x = _bytes(words)
    both = jnp.stack([x & 15, x >> 4], axis=3)
    return _from_blocks(both, layout)


def _pairs(wide: jax.Array, layout: WeightLayout) -> jax.Array:
    """float32 `[G, N]` -> `[N/16, T, 8, P, 2]`."""
    blocks = tiles(layout)[0]
    per = max(1, TILE // layout.group_size)
    count = tiles(layout)[1] if per > 1 else layout.groups
    more = (count * per - layout.groups, blocks * ROWS - layout.n)
    wide = jnp.pad(wide, ((0, more[0]), (0, more[1])))
    return wide.reshape(count, per, blocks, 2, 8).transpose(2, 0, 4, 1, 3)


def _unpairs(pairs: jax.Array, layout: WeightLayout) -> jax.Array:
    wide = pairs.transpose(1, 3, 0, 4, 2).reshape(-1, pairs.shape[0] * ROWS)
    return wide[: layout.groups, : layout.n]


def _scales_to(scale: jax.Array, layout: WeightLayout) -> jax.Array:
    if layout.format in ("mxfp4", "mxfp8"):
        bits = scale.astype(jnp.uint16) << 7
        bits = jnp.where(scale == 0, jnp.uint16(1 << 6), bits)
        narrow = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
        wide = narrow.astype(jnp.float32)
    else:
        wide = scale.astype(jnp.float32)
    if not grouped(layout):
        blocks = tiles(layout)[0]
        return jnp.pad(wide, ((0, 0), (0, blocks * ROWS - layout.n)))[0]
    pairs = _pairs(wide, layout)
    if scale.dtype in (jnp.float32, jnp.float16):
        return pairs
    return jax.lax.bitcast_convert_type(pairs.astype(jnp.bfloat16), jnp.int32)


def _scales_from(scale: jax.Array, layout: WeightLayout) -> jax.Array:
    if not grouped(layout):
        wide = scale[None, : layout.n]
    else:
        if scale.dtype == jnp.int32:
            scale = jax.lax.bitcast_convert_type(scale, jnp.bfloat16)
        wide = _unpairs(scale, layout)
    if layout.format not in ("mxfp4", "mxfp8"):
        return wide.astype(layout.scale_dtype)
    bits = jax.lax.bitcast_convert_type(wide.astype(jnp.bfloat16), jnp.uint16)
    return (bits >> 7).astype(jnp.uint8)
