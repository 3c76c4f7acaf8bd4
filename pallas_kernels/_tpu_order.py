"""The order `tpu` of packed planes: what one load of a block leaves ready to decode.

K is padded to tiles of 256 (beyond eight tiles to fours of them), N to 128. The four
bytes of an int32 word are four consecutive k of one output, as a TPU holds bytes in a
vector register.

  plane   holds
  codes   t2      int32 [K/16, N]: for 128 weights eight words; k = 32 j + 4 r + p is
                  a two's complement value at bit 8 p + 2 j of word r
          sherry  int32 [K/32, N]: for 256 weights eight words; bit 8 p + t of word r is
                  lane p of group 8 t + r, the sign (1 is negative) or, in the zero
                  lane z, the sign of lane z xor 2 xor z >> 1
          int4, nf4     int32 [K/8, N]: eight consecutive nibbles, int4 signed
          nvfp4, mxfp4  int32 [K/8, N]: for 64 weights eight words; k = 32 h + 4 r + p
                  is the nibble at bit 8 p + 4 h of word r
          int8, float8, mxfp8   [K, N], integers signed
  high    sherry  int32 [ceil(K/1024) * 8, N]: bit 8 b + t of word r is z & 1 of group
                  8 t + r of the tile 4 i + b, for the i-th eight words
  scale   [1, N], or for groups [K/c, N], a row for c weights: `scale_run`
  zero    bfloat16, as `scale`; what is subtracted from the signed code
  scale2  float32 [1, N] (nvfp4)

In this variant of the parity code both bits of a zero position come out of one
exclusive or and one word of `high`: fewer steps than the canonical code needs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels._weights import CANONICAL, Planes, WeightLayout

ORDER = "tpu"
TILE, LANES = 256, 128
MICROSCALING = ("nvfp4", "mxfp4", "mxfp8")
FP4 = ("nvfp4", "mxfp4")


def tiles(layout: WeightLayout) -> int:
    """Tiles of 256 weights along the padded K."""
    count = -(-layout.k // TILE)
    return count if count <= 8 else -(-count // 4) * 4


def padded_n(layout: WeightLayout) -> int:
    """N in whole vectors of 128 lanes."""
    return -(-layout.n // LANES) * LANES


def group_run(layout: WeightLayout) -> int:
    """Longest power of two, up to 1024, that divides the groups: no run of so many
    weights crosses from one scale to another."""
    return math.gcd(layout.group_size, 1024)


def scale_run(layout: WeightLayout) -> int:
    """Weights under one row of the scale plane.

    Short enough that a block of 1024 has whole tiles of rows: 8, of bytes 32.
    """
    most = 32 if layout.format in MICROSCALING else 128
    return min(group_run(layout), most)


def prepare(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Canonical planes into the order "tpu"."""
    codes = planes["codes"]
    out = {}
    if layout.format == "t2":
        out["codes"] = _crumbs(codes, layout)
    elif layout.format == "sherry":
        out["codes"], out["high"] = _sherry(codes, planes["high"], layout)
    elif layout.format in FP4:
        nibbles = jnp.stack([codes & 15, codes >> 4], 1).reshape(-1, layout.n)
        halves = _pad(nibbles, layout).reshape(-1, 2, 32, padded_n(layout))
        stored = halves[:, 0] | (halves[:, 1] << 4)
        out["codes"] = _words(stored.reshape(-1, stored.shape[-1]))
    elif layout.per_byte == 2:
        signed = codes if layout.symmetric else codes ^ 0x88
        out["codes"] = _words(_pad(signed, layout, 2))
    else:
        if not layout.symmetric:
            codes = jax.lax.bitcast_convert_type(codes ^ 128, jnp.int8)
        out["codes"] = _pad(codes[: layout.k], layout)
    scale = planes["scale"]
    # Mosaic has no float16.
    wide = scale.astype(jnp.float32) if scale.dtype == jnp.float16 else scale
    out["scale"] = _spread(wide, layout)
    if "zero" in planes:
        middle = 8 if layout.per_byte == 2 else 128
        zero = planes["zero"].astype(jnp.float32) - middle
        out["zero"] = _spread(zero.astype(jnp.bfloat16), layout)
    if "scale2" in planes:
        out["scale2"] = jnp.broadcast_to(planes["scale2"], (1, padded_n(layout)))
    dtype = jnp.dtype(scale.dtype).name
    return out, layout.replace(order=ORDER, scale_dtype=dtype)


def restore(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Exact inverse of `prepare`, padding cut off."""
    codes = planes["codes"]
    out = {}
    if layout.format == "t2":
        out["codes"] = _uncrumbs(codes, layout)
    elif layout.format == "sherry":
        out["codes"], out["high"] = _unsherry(codes, planes["high"], layout)
    elif layout.format in FP4:
        stored = _bytes(codes).reshape(-1, 1, 32, codes.shape[1])
        nibbles = jnp.concatenate([stored & 15, stored >> 4], 1)
        nibbles = nibbles.reshape(-1, codes.shape[1])
        pairs = _cut(nibbles, layout, 2).reshape(-1, 2, layout.n)
        out["codes"] = pairs[:, 0] | (pairs[:, 1] << 4)
    elif layout.per_byte == 2:
        signed = _bytes(codes)[: -(-layout.k // 2), : layout.n]
        out["codes"] = signed if layout.symmetric else signed ^ 0x88
    else:
        out["codes"] = codes[: layout.k, : layout.n]
        if not layout.symmetric:
            signed = jax.lax.bitcast_convert_type(out["codes"], jnp.uint8)
            out["codes"] = signed ^ 128
    out["scale"] = _gather(planes["scale"], layout).astype(layout.scale_dtype)
    if "zero" in planes:
        middle = 8 if layout.per_byte == 2 else 128
        zero = _gather(planes["zero"], layout).astype(jnp.float32) + middle
        out["zero"] = zero.astype(jnp.uint8)
    if "scale2" in planes:
        out["scale2"] = planes["scale2"][:, :1]
    return out, layout.replace(order=CANONICAL, scale_dtype="")


def _pad(x: jax.Array, layout: WeightLayout, per_row: int = 1) -> jax.Array:
    """`[rows, N]` with rows of `per_row` weights, padded to whole tiles."""
    rows = tiles(layout) * TILE // per_row
    x = x[:rows]
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, padded_n(layout) - layout.n)))


def _cut(x: jax.Array, layout: WeightLayout, unit: int) -> jax.Array:
    """Whole units of weights `[K', N]` out of padded ones."""
    return x[: -(-layout.k // unit) * unit, : layout.n]


def _words(x: jax.Array) -> jax.Array:
    """Bytes `[4 R, N]` into int32 `[R, N]`."""
    quads = x.reshape(-1, 4, x.shape[1]).swapaxes(1, 2)
    return jax.lax.bitcast_convert_type(quads, jnp.int32)


def _bytes(words: jax.Array) -> jax.Array:
    """Inverse of `_words`: uint8."""
    quads = jax.lax.bitcast_convert_type(words, jnp.uint8)
    return quads.swapaxes(1, 2).reshape(-1, words.shape[1])


def _crumbs(codes: jax.Array, layout: WeightLayout) -> jax.Array:
    shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
    runs = codes.reshape(-1, 1, layout.run // 4, layout.n)
    values = ((runs >> shift) - jnp.uint8(1)) & 3
    values = values.reshape(-1, layout.n)[: tiles(layout) * TILE]
    fields = _pad(values, layout).reshape(-1, 4, 32, padded_n(layout))
    stored = jnp.sum(fields << shift, axis=1, dtype=jnp.uint8)
    return _words(stored.reshape(-1, stored.shape[-1]))


def _uncrumbs(words: jax.Array, layout: WeightLayout) -> jax.Array:
    shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
    stored = _bytes(words).reshape(-1, 1, 32, words.shape[1])
    values = ((stored >> shift) + jnp.uint8(1)) & 3
    values = values.reshape(-1, words.shape[1])
    length = -(-layout.k // layout.run) * layout.run
    # A run may reach beyond the last tile; there is only padding, of zeros.
    short = max(length - values.shape[0], 0)
    values = jnp.pad(values, ((0, short), (0, 0)), constant_values=1)
    runs = values[:length, : layout.n].reshape(-1, 4, layout.run // 4, layout.n)
    packed = jnp.sum(runs << shift, axis=1, dtype=jnp.uint8)
    return packed.reshape(-1, layout.n)


def _zero_lanes(high: jax.Array, low: jax.Array) -> list[jax.Array]:
    """Masks of the groups whose zero is in lane 0, 1, 2, 3."""
    return [(high if p >= 2 else ~high) & (low if p % 2 else ~low) for p in range(4)]


def _sherry(
    signs: jax.Array, high: jax.Array, layout: WeightLayout
) -> tuple[jax.Array, jax.Array]:
    lane = [signs[p::4] for p in range(4)]  # bytes of eight groups, [K/32, N]
    low = lane[0] ^ lane[1] ^ lane[2] ^ lane[3]
    zero = _zero_lanes(high, low)
    lane = [(lane[p] & ~zero[p]) | (zero[p] & (lane[p ^ 2] ^ high)) for p in range(4)]
    turned = [_transpose_bits(_pad(b, layout, 32)) for b in lane]
    stored = jnp.stack(turned, axis=1).reshape(-1, padded_n(layout))
    count = tiles(layout)
    packed = _transpose_bits(_pad(low, layout, 32)).reshape(count, 8, -1)
    packed = jnp.pad(packed, ((0, -count % 4), (0, 0), (0, 0)))
    packed = packed.reshape(-1, 4, 8, packed.shape[-1]).swapaxes(1, 2)
    return _words(stored), _words(packed.reshape(-1, packed.shape[-1]))


def _unsherry(
    words: jax.Array, high_words: jax.Array, layout: WeightLayout
) -> tuple[jax.Array, jax.Array]:
    n, count = words.shape[1], tiles(layout)
    stored = _bytes(words).reshape(-1, 4, n)
    lane = [_transpose_bits(stored[:, p]) for p in range(4)]
    packed = _bytes(high_words).reshape(-1, 8, 4, n).swapaxes(1, 2)
    low = _transpose_bits(packed.reshape(-1, 8, n)[:count].reshape(-1, n))
    high = (low & (lane[1] ^ lane[3])) | (~low & (lane[0] ^ lane[2]))
    zero = _zero_lanes(high, low)
    parity = lane[0] ^ lane[1] ^ lane[2] ^ lane[3] ^ low
    # The free bit makes the parity of its group `low` again.
    lane = [lane[p] ^ (zero[p] & parity) for p in range(4)]
    unit = 1 if layout.group_stride == 1 else 2
    length = -(-layout.k // (32 * unit)) * unit
    signs = jnp.stack(lane, axis=1)[:length].reshape(-1, n)
    return signs[:, : layout.n], high[:length, : layout.n]


def _transpose_bits(x: jax.Array) -> jax.Array:
    """Eight bytes by eight bits turned over, for every eight rows of `[R, N]`."""
    index = jnp.arange(8, dtype=jnp.uint8)
    x = x.reshape(-1, 8, x.shape[-1])
    bits = (x[:, :, None] >> index[:, None]) & 1  # [R/8, byte t, bit r, N]
    out = jnp.sum(bits << index[:, None, None], axis=1, dtype=jnp.uint8)
    return out.reshape(-1, x.shape[-1])


def _spread(scale: jax.Array, layout: WeightLayout) -> jax.Array:
    """`[G, N]` into a row for each `scale_run` weights; one row if there is one."""
    columns = ((0, 0), (0, padded_n(layout) - layout.n))
    if layout.groups == 1:
        return jnp.pad(scale, columns)
    rows = tiles(layout) * TILE // scale_run(layout)
    each = layout.group_size // scale_run(layout)
    scale = jnp.repeat(jnp.pad(scale, columns), each, axis=0)[:rows]
    return jnp.pad(scale, ((0, rows - scale.shape[0]), (0, 0)))


def _gather(spread: jax.Array, layout: WeightLayout) -> jax.Array:
    each = layout.group_size // scale_run(layout)
    return spread[:: max(each, 1) if layout.groups > 1 else 1, : layout.n][
        : layout.groups
    ]
