"""Packed words to what a TPU's matrix unit multiplies, inside a Pallas kernel.

A byte with only bits 7 (sign) and 6 (not zero) is an int8 of +-64 and an e4m3 of +-2 at
once, so two shifts and masks of words decode ternary weights. FP4 values are moved into
the fields of an e5m2, which every TPU converts. The powers of two that come out of this
are taken back by `factor`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dense import NF4_LEVELS
from pallas_kernels._tpu_order import FP4, TILE
from pallas_kernels._weights import WeightLayout

_EVEN, _ODD = 0x00FF00FF, 0xFF00FF00
_LOW, _HIGH = 0x0000FFFF, 0xFFFF0000


def factor(layout: WeightLayout, operand: Any) -> float:
    """What decoded values must be multiplied by."""
    if layout.format in ("t2", "sherry"):
        return 0.5 if operand == jnp.float8_e4m3fn else 1 / 64
    return 2.0**14 if layout.format in FP4 else 1.0


def block(refs: dict[str, Any], layout: WeightLayout, operand: Any) -> jax.Array:
    """The weights of one block, `[K', N']` in natural order, without their scales.

    Args:
      refs: planes of the order "tpu", in VMEM.
      layout: theirs.
      operand: dtype to multiply in.
    """
    codes = refs["codes"][...]
    if layout.format == "sherry":
        return _ternary(_sherry(codes, refs["high"][...]), operand)
    if layout.format == "t2":
        return _ternary(_crumbs(codes), operand)
    if layout.format in FP4:
        return _convert(_fp4(codes), operand)
    if layout.format == "nf4":
        return _nf4(codes).astype(operand)
    if layout.per_byte == 2:
        codes = pltpu.bitcast(codes, jnp.int4)
    return _convert(codes, operand)


def scale_rows(rows: jax.Array, layout: WeightLayout) -> jax.Array:
    """Rows of the scale plane as float32."""
    if layout.format in ("mxfp4", "mxfp8"):
        return pltpu.bitcast(_left(rows.astype(jnp.int32), 23), jnp.float32)
    return rows.astype(jnp.float32)


def _convert(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else x.astype(dtype)


def _word(bits: int) -> Any:
    return np.uint32(bits).astype(np.int32)


def _left(x: jax.Array, by: int) -> jax.Array:
    return jax.lax.shift_left(x, np.int32(by)) if by else x


def _right(x: jax.Array, by: int) -> jax.Array:
    return jax.lax.shift_right_logical(x, np.int32(by)) if by else x


def _ternary(words: list[jax.Array], operand: Any) -> jax.Array:
    stacked = jnp.concatenate(words, axis=0)
    if operand == jnp.float8_e4m3fn:
        return pltpu.bitcast(stacked, operand)
    return _convert(pltpu.bitcast(stacked, jnp.int8), operand)


def _crumbs(codes: jax.Array) -> list[jax.Array]:
    top = _word(0xC0C0C0C0)
    return [
        _left(codes[r : r + 8], shift) & top
        for r in range(0, codes.shape[0], 8)
        for shift in (6, 4, 2, 0)
    ]


def _sherry(codes: jax.Array, high: jax.Array) -> list[jax.Array]:
    """Words of four weights, 32 rows of each tile after the other."""
    words, count = [], codes.shape[0] * 32 // TILE
    for tile in range(count):
        if tile % 4 == 0:
            low_bits = _replicated(high[2 * tile : 2 * tile + 8])
        s = codes[8 * tile : 8 * tile + 8]
        pair = s ^ (_left(s, 16) | _right(s, 16))
        kept = (pair ^ _word(_HIGH)) | low_bits[tile % 4]
        # The free bit of a zero lane would make it int8's -128, or a -0 at best.
        words += _fields(s & kept, kept)
    return words


def _replicated(high: jax.Array) -> list[jax.Array]:
    """For each of four tiles: its byte in lanes 0 and 2, inverted in lanes 1 and 3."""
    halves = []
    for shift in (0, 8):
        byte = _right(high, shift) & _word(_EVEN)
        halves.append((byte | _left(byte, 8)) ^ _word(_ODD))
    low = [half & _word(_LOW) for half in halves]
    top = [half & _word(_HIGH) for half in halves]
    return [x | _left(x, 16) for x in low] + [x | _right(x, 16) for x in top]


def _fields(sign: jax.Array, kept: jax.Array) -> list[jax.Array]:
    """Bit t of all bytes of both words to bits 7 and 6, for t = 0 to 7."""
    odd = _word(0xAAAAAAAA)
    shifted, moved = _right(kept, 1), _left(sign, 1)
    a = shifted ^ ((sign ^ shifted) & odd)
    b = kept ^ ((moved ^ kept) & odd)
    return [
        _left(a if t % 2 else b, 6 - t // 2 * 2) & _word(0xC0C0C0C0) for t in range(8)
    ]


def _fp4(codes: jax.Array) -> jax.Array:
    sign, value = _word(0x80808080), _word(0x0E0E0E0E)
    words = []
    for r in range(0, codes.shape[0], 8):
        w = codes[r : r + 8]
        words.append((_left(w, 4) & sign) | (_left(w, 1) & value))
        words.append((w & sign) | (_right(w, 3) & value))
    return pltpu.bitcast(jnp.concatenate(words, axis=0), jnp.float8_e5m2)


def _nf4(codes: jax.Array) -> jax.Array:
    """float32 levels, looked up along the lanes of a vector register."""
    index = pltpu.bitcast(codes, jnp.int4).astype(jnp.int32) & 15
    lane = jax.lax.broadcasted_iota(jnp.int32, (8, 128), 1)
    table = jnp.zeros((8, 128), jnp.float32)
    for i, level in enumerate(NF4_LEVELS):
        table = jnp.where(lane == i, jnp.float32(level), table)
    k, n = index.shape
    rows = [
        jnp.concatenate(
            [
                jnp.take_along_axis(table, index[r : r + 8, c : c + 128], axis=1)
                for c in range(0, n, 128)
            ],
            axis=1,
        )
        for r in range(0, k, 8)
    ]
    return jnp.concatenate(rows, axis=0)
