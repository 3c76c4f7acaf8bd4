"""Sherry: 3:4 sparse ternary weights in exactly 1.25 bits.

In every group of four along K the smallest magnitude becomes 0 and the other three
become their sign times a scale, the mean magnitude of what is kept (Sherry, arXiv
2601.07892, equations 4-5; L2-optimal for unweighted error by its appendix D). 4
positions times 2^3 signs are 32 states: 5 bits for 4 weights.

The code stores a nibble of four sign bits (1 is negative). The bit of the zero lane
z = 2 h + l means nothing, so it is chosen to make the parity of the nibble equal l; h
is the fifth bit. Eight groups make a word of 32 weights: four bytes of `codes`, byte p
holding the sign bits of lane p with group j at bit j, and one byte of `high` with the h
of group j at bit j.

`group_stride=1` groups weights 4j..4j+3 of K (as training code does). `group_stride=16`
groups weights j, j+16, j+32, j+48 of each run of 64 (as the GGUF type STQ1_0 does).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.formats._blocks import Granules
from angeljax.formats._registry import Format, Planes, Snapped, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import values
from angeljax.formats.ternary import mean_scale


def to_quads(x: jax.Array, stride: int) -> jax.Array:
    """`[..., g]` -> `[..., g / 4, 4]`: the groups of four and their lanes."""
    if stride == 1:
        return x.reshape(*x.shape[:-1], -1, 4)
    runs = x.reshape(*x.shape[:-1], -1, 4, 16)
    return jnp.swapaxes(runs, -1, -2).reshape(*x.shape[:-1], -1, 4)


def from_quads(x: jax.Array, stride: int) -> jax.Array:
    """Inverse of `to_quads`."""
    if stride == 1:
        return x.reshape(*x.shape[:-2], -1)
    runs = x.reshape(*x.shape[:-2], -1, 16, 4)
    return jnp.swapaxes(runs, -1, -2).reshape(*x.shape[:-2], -1)


def pack_parity(zero: jax.Array, negative: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Packs groups of four into sign bytes and high bits.

    Args:
      zero: uint8 `[..., n]`, position of the zero in each group; `n` a multiple of 8.
      negative: bool `[..., n, 4]`; the entry of the zero lane is ignored.

    Returns:
      uint8 `[..., n / 2]` and uint8 `[..., n / 8]`: 5 bits for each group.
    """
    lane = jnp.arange(4, dtype=jnp.uint8)
    is_zero = zero[..., None] == lane
    signs = (negative & ~is_zero).astype(jnp.uint8)
    parity = signs[..., 0] ^ signs[..., 1] ^ signs[..., 2] ^ signs[..., 3]
    free = parity ^ (zero & 1)
    signs = jnp.where(is_zero, free[..., None], signs)
    words = signs.reshape(*zero.shape[:-1], -1, 8, 4)
    codes = _bits_to_byte(jnp.swapaxes(words, -1, -2)).reshape(*zero.shape[:-1], -1)
    high = _bits_to_byte((zero >> 1).reshape(*zero.shape[:-1], -1, 8))
    return codes, high


def unpack_parity(codes: jax.Array, high: jax.Array) -> jax.Array:
    """Inverse of `pack_parity`: int8 `[..., n, 4]` in {-1, 0, 1}."""
    bytes_ = codes.reshape(*codes.shape[:-1], -1, 4)
    parity = bytes_[..., 0] ^ bytes_[..., 1] ^ bytes_[..., 2] ^ bytes_[..., 3]
    # Byte p of a word: which groups have their zero in lane p. All eight at once.
    lanes = []
    for p in range(4):
        h = high if p >= 2 else ~high
        low = parity if p % 2 else ~parity
        lanes.append(h & low)
    is_zero = jnp.stack(lanes, axis=-1)[..., None]
    shift = jnp.arange(8, dtype=jnp.uint8)
    zero = ((is_zero >> shift) & 1).astype(jnp.int8)
    negative = ((bytes_[..., None] >> shift) & 1).astype(jnp.int8)
    values = (1 - 2 * negative) * (1 - zero)  # [..., words, lane, group]
    return jnp.swapaxes(values, -1, -2).reshape(*codes.shape[:-1], -1, 4)


def _bits_to_byte(bits: jax.Array) -> jax.Array:
    weights = (1 << jnp.arange(8, dtype=jnp.uint8)).astype(jnp.uint8)
    return jnp.sum(bits.astype(jnp.uint8) * weights, axis=-1, dtype=jnp.uint8)


def snap(w: jax.Array, spec: Spec, scale: jax.Array | None = None) -> Snapped:
    """Levels -1, 0, 1, one zero in four, and scales of blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    stride = spec.option("group_stride")
    levels, zero = _levels(w, stride)
    if scale is None:
        # What is padded is 0: it adds nothing to the sum but must not be counted.
        inside = jnp.asarray(granules.mask(), jnp.float32)
        total = granules.sum(jnp.where(zero, 0.0, jnp.abs(w)))
        count = granules.sum(jnp.where(zero, 0.0, inside))
        scale = total / jnp.maximum(count, 1.0)
    return levels, {"scale": mean_scale(jnp.maximum(scale, 0.0), spec)}


def _levels(w: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """Levels, and which lane of four is the zero: the first with the least |w|."""
    quads = to_quads(w, stride)
    a, b, c, d = (jnp.abs(quads[..., i]) for i in range(4))
    # Comparisons instead of an argmin over four: they fuse with what follows.
    low, high = jnp.minimum(a, b), jnp.minimum(c, d)
    first = low <= high
    lanes = (first & (a <= b), first & (a > b), ~first & (c <= d), ~first & (c > d))
    zero = from_quads(jnp.stack(lanes, axis=-1), stride)
    return jnp.where(zero, 0.0, jnp.where(w < 0, -1.0, 1.0)), zero


def encode(w: jax.Array, spec: Spec) -> Planes:
    """Sign bytes, high bits and scales of blocks `[*lead, G, g]`."""
    return pack(*snap(w, spec), spec)


def pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `snap` gave."""
    quads = to_quads(levels, spec.option("group_stride"))
    zero = jnp.argmax(quads == 0, axis=-1).astype(jnp.uint8)
    codes, high = pack_parity(zero, quads < 0)
    return {"codes": codes, "high": high, **granules}


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    quads = unpack_parity(planes["codes"], planes["high"]).astype(jnp.float32)
    t = from_quads(quads, spec.option("group_stride"))
    return t * Granules(spec).expand(planes["scale"].astype(jnp.float32))


register(
    Format(
        name="sherry",
        payload_bits=1.25,
        encode=encode,
        decode=decode,
        unit=32,
        unit_for=lambda spec: 64 if spec.option("group_stride") == 16 else 32,
        granularities=("group", "channel", "tensor"),
        options={"group_stride": (1, 16)},
        summary="3:4 sparse ternary, 5 bits for 4 weights",
        snap=snap,
        pack=pack,
        clip=lambda spec: (-1.0, 1.0),
        level_depends_on_scale=False,
        scales=lambda w, spec: snap(w, spec)[1],
        nearest=lambda w, planes, spec: _levels(w, spec.option("group_stride"))[0],
        values=values,
        pointwise=False,
    )
)
