"""Packing small integer codes into bytes along the last axis.

All functions are shape-polymorphic in the leading axes, work under `jit` and `vmap`,
and never look across the last axis' groups: packing stays local to what the caller
put on the last axis.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

__all__ = [
    "pack_base3",
    "pack_bits",
    "pack_planar2",
    "packed_size",
    "unpack_base3",
    "unpack_bits",
    "unpack_planar2",
]


def unit_of(bits: int) -> int:
    """Number of `bits`-wide codes in the shortest whole number of bytes."""
    return math.lcm(8, bits) // bits


def packed_size(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits take; `n` must fill whole units."""
    return n * bits // 8


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Packs unsigned codes densely, first code in the lowest bits.

    Args:
      codes: uint8 `[..., n]`, values below `2**bits`; `n` a multiple of
        `lcm(8, bits) / bits` (2 codes for 4 bits, 8 codes for 3 bits).
      bits: 1, 2, 3, 4 or 8.

    Returns:
      uint8 `[..., n * bits / 8]`, little-endian bit order.

    Example:
      >>> import jax.numpy as jnp
      >>> pack_bits(jnp.array([1, 2, 3, 4], jnp.uint8), 4).tolist()
      [33, 67]
    """
    if bits == 8:
        return codes.astype(jnp.uint8)
    assert bits <= 4, "a unit of 5 to 7 bits does not fit a 32-bit word"
    unit = unit_of(bits)
    n_bytes = unit * bits // 8
    words = codes.reshape(*codes.shape[:-1], -1, unit).astype(jnp.uint32)
    # A unit has at most 24 bits (3 bits: 8 codes), so that one 32-bit word holds it and
    # a byte is a shift of that word.
    word = words[..., 0]
    for i in range(1, unit):
        word = word | (words[..., i] << (bits * i))
    out = jnp.stack([(word >> (8 * b)) & 0xFF for b in range(n_bytes)], axis=-1)
    return out.astype(jnp.uint8).reshape(*codes.shape[:-1], -1)


def unpack_bits(data: jax.Array, bits: int) -> jax.Array:
    """Inverse of `pack_bits`: uint8 `[..., n * bits / 8]` -> uint8 `[..., n]`."""
    if bits == 8:
        return data
    unit = unit_of(bits)
    n_bytes = unit * bits // 8
    parts = data.reshape(*data.shape[:-1], -1, n_bytes)
    if n_bytes == 1:
        word = parts[..., 0]
    else:
        wide = parts.astype(jnp.uint32)
        word = wide[..., 0]
        for b in range(1, n_bytes):
            word = word | (wide[..., b] << (8 * b))
    mask = (1 << bits) - 1
    out = jnp.stack([(word >> (bits * i)) & mask for i in range(unit)], axis=-1)
    return out.astype(jnp.uint8).reshape(*data.shape[:-1], -1)


def pack_planar2(codes: jax.Array, run: int) -> jax.Array:
    """Packs 2-bit codes so that a byte holds elements a quarter run apart.

    In each run of `run` elements, byte `j` holds elements `j`, `j + run/4`, `j +
    run/2`, `j + 3 run/4` in bits 0-1, 2-3, 4-5, 6-7. Four contiguous quarters come out
    of a run by a shift and a mask, without a shuffle. With `run=128` this is the order
    of the GGUF type TQ2_0.

    Args:
      codes: uint8 `[..., n]` below 4, `n` a multiple of `run`.
      run: a multiple of 4.

    Returns:
      uint8 `[..., n / 4]`.
    """
    q = codes.reshape(*codes.shape[:-1], -1, 4, run // 4).astype(jnp.uint8)
    out = q[..., 0, :] | (q[..., 1, :] << 2) | (q[..., 2, :] << 4) | (q[..., 3, :] << 6)
    return out.reshape(*codes.shape[:-1], -1)


def unpack_planar2(data: jax.Array, run: int) -> jax.Array:
    """Inverse of `pack_planar2`: uint8 `[..., n / 4]` -> uint8 `[..., n]`."""
    q = data.reshape(*data.shape[:-1], -1, 1, run // 4)
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
    return ((q >> shifts) & 3).reshape(*data.shape[:-1], -1)


def pack_base3(digits: jax.Array) -> jax.Array:
    """Packs base-3 digits five to a byte, as a fixed-point fraction of 256.

    Digit `i` of byte `j` is element `j + i * ceil(n / 5)`. The byte is
    `ceil(256 v / 243)` for the number `v` with digit 0 leading, so that a digit comes
    out by one multiplication and a shift (the arithmetic of the GGUF type TQ1_0).

    Args:
      digits: uint8 `[..., n]` in {0, 1, 2}.

    Returns:
      uint8 `[..., ceil(n / 5)]`.
    """
    n = digits.shape[-1]
    n_bytes = -(-n // 5)
    pad = [(0, 0)] * (digits.ndim - 1) + [(0, 5 * n_bytes - n)]
    d = jnp.pad(digits, pad, constant_values=1).astype(jnp.uint32)
    d = d.reshape(*digits.shape[:-1], 5, n_bytes)
    value = d[..., 0, :]
    for i in range(1, 5):
        value = 3 * value + d[..., i, :]
    return ((value * 256 + 242) // 243).astype(jnp.uint8)


def unpack_base3(data: jax.Array, n: int) -> jax.Array:
    """Inverse of `pack_base3`: uint8 `[..., ceil(n / 5)]` -> uint8 `[..., n]`."""
    powers = jnp.array([1, 3, 9, 27, 81], jnp.uint32)[:, None]
    rest = (data[..., None, :].astype(jnp.uint32) * powers) & 0xFF
    digits = ((rest * 3) >> 8).astype(jnp.uint8)
    return digits.reshape(*data.shape[:-1], -1)[..., :n]
