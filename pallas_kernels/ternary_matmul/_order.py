"""The order `hopper` of ternary planes: fragments of the tensor cores' left operand.

A tile is 16 outputs x 256 weights along K. Lane 4g + q of a warp holds four words of
it, word h + 2b with outputs g + 8h and k = 128 b + 16 j + 4 q + p at bit 8p + j. In
this order the words are operands of `mma.m16n8k256` on bits as they are, and the four
weights of one j are one register of `wgmma.m64nNk32` on bytes.

  plane   shape                          holds
  codes   t2      int32 [N/16, K/256, 2, 32, 4]: bits of +1, inverted bits of -1
          sherry  int32 [N/16, K/256, 32, 4]: signs of the parity code
  high    sherry  int32 [N/16, K/256, 32]: byte i for word i, bit j for group j
  scale   one for each output: float32 [N']; for groups: int32 [N/16, G, 8] of
          bfloat16 pairs or float32 [N/16, G, 8, 2], outputs g and g + 8
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._weights import CANONICAL, Planes, WeightLayout

ORDER = "hopper"
TILE, ROWS = 256, 16


def stored_k(layout: WeightLayout) -> int:
    """Weights along K that canonical code planes hold: whole units."""
    if layout.format == "t2":
        unit = layout.run
    else:
        unit = 32 if layout.group_stride == 1 else 64
    return -(-layout.k // unit) * unit


def tiles(layout: WeightLayout) -> tuple[int, int]:
    """Row blocks of 16 outputs, tiles of 256 along K; whole blocks of 128 outputs."""
    return -(-layout.n // 128) * 8, -(-stored_k(layout) // TILE)


def to_hopper(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Canonical planes `[*, N]` into fragments."""
    k = stored_k(layout)
    if layout.format == "t2":
        runs = planes["codes"].reshape(-1, 1, layout.run // 4, layout.n)
        shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
        values = ((runs >> shift) & 3).reshape(k, layout.n)
        pos, keep = _words(values == 2, layout), _words(values != 0, layout)
        out = {"codes": jnp.stack([pos, keep], axis=2)}
    else:
        bits = _bits(planes["codes"]).reshape(-1, 4, 8, layout.n)
        signs = bits.transpose(0, 2, 1, 3).reshape(k, layout.n)
        high = _bits(planes["high"]).reshape(k // 4, layout.n)
        out = {"codes": _words(signs, layout), "high": _high(high, layout)}
    out["scale"] = _scales_to(planes["scale"], layout)
    dtype = jnp.dtype(planes["scale"].dtype).name
    return out, layout.replace(order=ORDER, scale_dtype=dtype)


def from_hopper(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Inverse of `to_hopper`, padding cut off."""
    k = stored_k(layout)
    if layout.format == "t2":
        pos = _unwords(planes["codes"][:, :, 0], layout)
        keep = _unwords(planes["codes"][:, :, 1], layout)
        values = (pos + keep).astype(jnp.uint8)
        runs = values.reshape(-1, 4, layout.run // 4, layout.n)
        shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
        codes = jnp.sum(runs << shift, axis=1, dtype=jnp.uint8)
        out = {"codes": codes.reshape(-1, layout.n)}
    else:
        signs = _unwords(planes["codes"], layout).reshape(-1, 8, 4, layout.n)
        codes = _bytes(signs.transpose(0, 2, 1, 3)).reshape(k // 8, layout.n)
        high = _unhigh(planes["high"], layout).reshape(-1, 8, layout.n)
        out = {"codes": codes, "high": _bytes(high[:, None])[:, 0]}
    out["scale"] = _scales_from(planes["scale"], layout)
    return out, layout.replace(order=CANONICAL, scale_dtype="")


def _bits(stored: jax.Array) -> jax.Array:
    """uint8 `[R, N]` -> `[R, 8, N]`, lowest bit first."""
    shift = jnp.arange(8, dtype=jnp.uint8)[:, None]
    return (stored[:, None] >> shift) & 1


def _bytes(bits: jax.Array) -> jax.Array:
    """`[..., 8, N]` -> uint8 `[..., N]`, inverse of `_bits`."""
    shift = jnp.arange(8, dtype=jnp.uint8)[:, None]
    return jnp.sum(bits.astype(jnp.uint8) << shift, axis=-2, dtype=jnp.uint8)


def _pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _words(bits: jax.Array, layout: WeightLayout) -> jax.Array:
    """bits `[K, N]` -> int32 `[N/16, K/256, 32, 4]`."""
    blocks, k_tiles = tiles(layout)
    x = _pad(bits.astype(jnp.uint32), k_tiles * TILE, blocks * ROWS)
    x = x.reshape(k_tiles, 2, 8, 4, 4, blocks, 2, 8)  # t b j q p | nb h g
    place = (
        jnp.arange(4, dtype=jnp.uint32) * 8 + jnp.arange(8, dtype=jnp.uint32)[:, None]
    )
    x = x << place[:, None, :, None, None, None]
    words = jnp.sum(x, axis=(2, 4), dtype=jnp.uint32)  # t b q nb h g
    words = words.transpose(3, 0, 5, 2, 1, 4).reshape(blocks, k_tiles, 32, 4)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _unwords(words: jax.Array, layout: WeightLayout) -> jax.Array:
    """Inverse of `_words`: uint8 bits `[K, N]`."""
    blocks, k_tiles = tiles(layout)
    x = jax.lax.bitcast_convert_type(words, jnp.uint32)
    x = x.reshape(blocks, k_tiles, 8, 4, 2, 2).transpose(1, 4, 3, 0, 5, 2)
    place = (
        jnp.arange(4, dtype=jnp.uint32) * 8 + jnp.arange(8, dtype=jnp.uint32)[:, None]
    )
    bits = (x[:, :, None, :, None] >> place[:, None, :, None, None, None]) & 1
    bits = bits.reshape(k_tiles * TILE, blocks * ROWS).astype(jnp.uint8)
    return bits[: stored_k(layout), : layout.n]


def _high(high: jax.Array, layout: WeightLayout) -> jax.Array:
    """Bits of the groups `[K/4, N]` -> int32 `[N/16, K/256, 32]`."""
    blocks, k_tiles = tiles(layout)
    x = _pad(high.astype(jnp.uint32), k_tiles * TILE // 4, blocks * ROWS)
    x = x.reshape(k_tiles, 2, 8, 4, blocks, 2, 8)  # t b j q | nb h g
    x = x << _high_place()
    words = jnp.sum(x, axis=(1, 2, 5), dtype=jnp.uint32)  # t q nb g
    words = words.transpose(2, 0, 3, 1).reshape(blocks, k_tiles, 32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _high_place() -> jax.Array:
    b = jnp.arange(2, dtype=jnp.uint32)[:, None, None, None, None, None]
    j = jnp.arange(8, dtype=jnp.uint32)[:, None, None, None, None]
    h = jnp.arange(2, dtype=jnp.uint32)[:, None]
    return 8 * (h + 2 * b) + j


def _unhigh(words: jax.Array, layout: WeightLayout) -> jax.Array:
    """Inverse of `_high`: uint8 bits `[K/4, N]`."""
    blocks, k_tiles = tiles(layout)
    x = jax.lax.bitcast_convert_type(words, jnp.uint32)
    x = x.reshape(blocks, k_tiles, 8, 4).transpose(1, 3, 0, 2)  # t q nb g
    bits = (x[:, None, None, :, :, None] >> _high_place()) & 1
    bits = bits.reshape(k_tiles * TILE // 4, blocks * ROWS).astype(jnp.uint8)
    return bits[: stored_k(layout) // 4, : layout.n]


def _scales_to(scale: jax.Array, layout: WeightLayout) -> jax.Array:
    blocks, _ = tiles(layout)
    wide = scale.astype(jnp.float32)
    wide = jnp.pad(wide, ((0, 0), (0, blocks * ROWS - layout.n)))
    if layout.groups == 1:
        return wide[0]
    pairs = wide.reshape(layout.groups, blocks, 2, 8).transpose(1, 0, 3, 2)
    if scale.dtype != jnp.bfloat16:
        return pairs
    return jax.lax.bitcast_convert_type(pairs.astype(jnp.bfloat16), jnp.int32)


def _scales_from(scale: jax.Array, layout: WeightLayout) -> jax.Array:
    dtype = jnp.dtype(layout.scale_dtype)
    if layout.groups == 1:
        return scale[None, : layout.n].astype(dtype)
    if scale.dtype == jnp.int32:
        scale = jax.lax.bitcast_convert_type(scale, jnp.bfloat16)
    wide = scale.transpose(1, 0, 3, 2).reshape(layout.groups, -1)
    return wide[:, : layout.n].astype(dtype)
