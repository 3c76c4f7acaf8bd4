"""Sets of blocks as bits of words: the best of each row, and lists of them.

Bit b of word w stands for block `32 w + b`. A row of 1024 blocks is 32 words, so that
all that follows a comparison of scores works on a thirty-second of the array, without a
sort, a scatter, or a running sum over the scores.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import BlockLists

BITS = 32
# Bits of a key that one pass over the scores settles, with 2**n - 1 comparisons.
_DIGIT = 4
_ALL = 0xFFFFFFFF

# A key of 0 is no candidate; this one precedes every score.
FIRST = 0xFFFF


def pack(mask: jax.Array) -> jax.Array:
    """uint32 `[..., ceil(n / 32)]` of bool `[..., n]`."""
    *lead, n = mask.shape
    words = -(-n // BITS)
    mask = jnp.pad(mask, [(0, 0)] * len(lead) + [(0, words * BITS - n)])
    bits = mask.reshape(*lead, words, BITS).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(BITS, dtype=jnp.uint32), -1, dtype=jnp.uint32)


def span(low: Any, high: Any, words: int) -> jax.Array:
    """Words of the blocks from `low` up to but without `high`, integers `[...]`."""
    base = jnp.arange(words, dtype=jnp.int32) * BITS
    ends = (jnp.asarray(x, jnp.int32)[..., None] - base for x in (low, high))
    below, upto = (_lowest(jnp.clip(x, 0, BITS)) for x in ends)
    return upto & ~below


def count(words: jax.Array) -> jax.Array:
    """int32 `[...]`: set bits of each row of words."""
    return jnp.sum(lax.population_count(words).astype(jnp.int32), -1)


def widen(words: jax.Array, to: int) -> jax.Array:
    """Words with zeros behind them."""
    pad = [(0, 0)] * (words.ndim - 1) + [(0, to - words.shape[-1])]
    return jnp.pad(words, pad)


def lists(words: jax.Array, width: int, block: int) -> BlockLists:
    """Lists of the set bits of `[B, H, num_q, words]`, the first `width` of each."""
    here = lax.population_count(words).astype(jnp.int32)
    upto = jnp.cumsum(here, -1)
    counts = jnp.minimum(upto[..., -1], width)
    last = jnp.maximum(counts, 1)[..., None] - 1
    slot = jnp.minimum(jnp.arange(width, dtype=jnp.int32), last)
    # The last word that starts at or before the slot, by bisection: one pass.
    word, size = jnp.zeros_like(slot), words.shape[-1]
    step = 1 << (size - 1).bit_length()
    while step := step // 2:
        later = word + step
        starts = _at(upto, jnp.minimum(later, size) - 1)
        word = jnp.where((later < size) & (starts <= slot), later, word)
    rank = slot - jnp.where(word > 0, _at(upto, jnp.maximum(word, 1) - 1), 0)
    bit = _nth_bit(_at(words, word), rank)
    return BlockLists(word * BITS + bit, counts, block, block)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index, -1, mode="promise_in_bounds")


def order16(x: jax.Array) -> jax.Array:
    """uint16 keys with the order of float32 scores, rounded to float16.

    Float16 holds three bits more than bfloat16; scores past its range keep its largest
    number. All keys lie between 0 and `FIRST`.
    """
    x = jnp.clip(x, -65504.0, 65504.0).astype(jnp.float16)
    x = jnp.where(x == 0, jnp.float16(0), x)  # no -0
    bits = lax.bitcast_convert_type(x, jnp.uint16)
    return jnp.where(bits >> 15, ~bits, bits | jnp.uint16(0x8000))


def order32(x: jax.Array) -> jax.Array:
    """uint32 keys with the order of float32 scores that are not negative."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def best(key: jax.Array, budget: jax.Array) -> jax.Array:
    """The `budget` highest keys of each row; of equals the first.

    The bar is found digit by digit: each pass counts the keys that reach each of 15
    bars.

    Args:
      key: uint16 or uint32 `[..., n]`, n below 65536.
      budget: int32 `[...]`, from 0 on.

    Returns:
      uint32 `[..., words]`. Rows with fewer candidates than `budget` also name keys of
      0: leave those out with a mask.
    """
    budget = jnp.asarray(budget)
    bar = _search(key, lambda bars: _counts(key, bars), budget)
    above = pack(key > bar)
    return above | _first(pack(key == bar), budget - count(above))


def until(
    key: jax.Array, mass: jax.Array, before: jax.Array, required: jax.Array
) -> jax.Array:
    """The highest keys of each row until their mass is enough; of equals the first.

    In falling order of keys each block is taken as long as the mass of `before` and of
    the blocks taken so far is less than `required`.

    Args:
      key: uint32 `[..., n]`; equal keys have equal mass.
      mass: float32 `[..., n]`, not negative; 0 where there is no candidate.
      before: float32 `[...]`.
      required: float32 `[...]`; infinite takes every block.

    Returns:
      uint32 `[..., words]`. Where all mass is less than `required`, keys of 0 are named
      too: leave those out with a mask.
    """

    def masses(bars: list[jax.Array]) -> list[jax.Array]:
        terms = [jnp.where(key >= bar, mass, 0) for bar in bars]
        return [before + total for total in sums(terms)]

    bar = _search(key, masses, required)
    over, same = key > bar, key == bar
    taken = before + jnp.sum(jnp.where(over, mass, 0), -1)
    each = jnp.max(jnp.where(same, mass, 0), -1)
    missing = jnp.ceil((required - taken) / jnp.maximum(each, 1e-30))
    # At least one: that the bar is reached is how it was found.
    ties = jnp.clip(missing, 1, key.shape[-1]).astype(jnp.int32)
    return pack(over) | _first(pack(same), ties)


def _search(key: jax.Array, measure: Any, wanted: jax.Array) -> jax.Array:
    """Highest bar `[..., 1]` that keys of at least the wanted measure reach."""
    rounds = jnp.iinfo(key.dtype).bits // _DIGIT

    def settle(i: Any, bar: jax.Array) -> jax.Array:
        low = jnp.asarray((rounds - 1 - i) * _DIGIT, key.dtype)
        one = jnp.ones((), key.dtype) << low
        reached = [
            m >= wanted for m in measure([bar + one * d for d in range(1, 2**_DIGIT)])
        ]
        digit = sum(r.astype(key.dtype) for r in reached)
        return bar + (digit * one)[..., None]

    # Four rounds are written out. Eight would take long to compile, and belong to
    # selectors whose scores take far longer than a loop's overhead.
    # Zeros made of the keys: under `shard_map` they vary over the mesh as those do.
    bar = key[..., :1] & 0
    if key.dtype == jnp.uint32:
        return lax.fori_loop(0, rounds, settle, bar)
    for i in range(rounds):
        bar = settle(i, bar)
    return bar


def _counts(key: jax.Array, bars: list[jax.Array]) -> list[jax.Array]:
    """int32 `[...]` for each bar: keys that reach it. Two counts share a sum."""
    hits = [(key >= bar).astype(jnp.uint32) for bar in bars]
    hits += [jnp.zeros_like(hits[0])] * (len(hits) % 2)
    pairs = [a | b << 16 for a, b in zip(hits[::2], hits[1::2], strict=True)]
    both = [(x & 0xFFFF, x >> 16) for x in sums(pairs)]
    return [c.astype(jnp.int32) for pair in both for c in pair][: len(bars)]


def sums(terms: list[jax.Array]) -> list[jax.Array]:
    """Sums over the last axis, all in one pass."""
    zeros = [jnp.zeros((), x.dtype) for x in terms]

    def add(a: Any, b: Any) -> Any:
        return [x + y for x, y in zip(a, b, strict=True)]

    return lax.reduce(terms, zeros, add, (terms[0].ndim - 1,))


def _first(words: jax.Array, wanted: jax.Array) -> jax.Array:
    """The first `wanted` set bits of each row."""
    here = lax.population_count(words).astype(jnp.int32)
    left = wanted[..., None] - (jnp.cumsum(here, -1) - here)
    kept = words & _lowest(_nth_bit(words, jnp.maximum(left, 0)))
    return jnp.where(left >= here, words, kept)


def _lowest(n: jax.Array) -> jax.Array:
    """uint32 with the lowest n bits set, n from 0 to 32."""
    some = (jnp.uint32(1) << jnp.minimum(n, 31).astype(jnp.uint32)) - 1
    return jnp.where(n >= BITS, jnp.uint32(_ALL), some)


def _nth_bit(bits: jax.Array, rank: jax.Array) -> jax.Array:
    """Place of the set bit that has `rank` set bits below it; 31 if there is none."""
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = lax.population_count(bits & _ALL >> (BITS - half)).astype(jnp.int32)
        above = rank >= low
        rank = jnp.where(above, rank - low, rank)
        bits = jnp.where(above, bits >> half, bits)
        place = place + jnp.where(above, half, 0)
    return place
