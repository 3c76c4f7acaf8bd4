"""Words of the order `hopper` to what the tensor cores multiply, in registers.

`words` of a lane are those of a tile: four of +1 bits and four of inverted -1 bits
(t2), or four of signs and one of the parity code (sherry). See `_order`.
"""

from __future__ import annotations

from pallas_kernels._hopper_tokens import permute
from pallas_kernels._ptx import Int

_ODD, _EVEN = 0xAAAAAAAA, 0x55555555


def masks(format: str, weights: list[Int]) -> tuple[list[Int], list[Int]]:
    """Four words each of `pos` and `keep` bits of a tile."""
    if format == "t2":
        return weights[:4], weights[4:]
    zeros = [_zeros(weights[:4], weights[4], i) for i in range(4)]
    pos = [~(s | z) for s, z in zip(weights, zeros, strict=False)]
    keep = [~s | z for s, z in zip(weights, zeros, strict=False)]
    return pos, keep


def _zeros(signs: list[Int], high: Int, i: int) -> Int:
    """Which bits of word i of the parity code stand for a zero weight."""
    s = signs[i]
    # Parity of each group in all four bytes, then which lane of it is zero.
    t = s ^ permute(s, s, 0x1032)
    parity = t ^ permute(t, t, 0x2301) ^ 0x00FF00FF
    upper = permute(high, ~high, (i << 12) | (i << 8) | ((4 + i) << 4) | (4 + i))
    return parity & upper


def _paired(high: Int, low: Int) -> tuple[Int, Int]:
    """Fields (high, low) of two bits: groups 0, 2, 4, 6, and groups 1, 3, 5, 7."""
    odd = (high & _ODD) | ((low >> 1) & _EVEN)
    even = ((high << 1) & _ODD) | (low & _EVEN)
    return even, odd


def fields(format: str, words: list[Int], i: int) -> list[Int]:
    """The eight groups of word i: group j holds w + 1 times 4^(j // 2) in each byte."""
    if format == "t2":
        pos, zero = words[i], words[4 + i] & ~words[i]
    else:
        zero = _zeros(words[:4], words[4], i)
        pos = ~(words[i] | zero)
    pair = _paired(pos, zero)
    return [pair[j & 1] & (0x03030303 << (j & 6)) for j in range(8)]


def signed_bytes(format: str, words: list[Int], i: int) -> list[Int]:
    """The eight groups of word i, each as four bytes of 64 w."""
    if format == "t2":
        negative = ~words[4 + i]
        present = words[i] | negative
    else:
        present = ~_zeros(words[:4], words[4], i)
        negative = words[i] & present
    pair = _paired(negative, present)
    shifts = [(6 - (j & 6)) for j in range(8)]
    return [
        ((pair[j & 1] << s) if s else pair[j & 1]) & 0xC0C0C0C0
        for j, s in enumerate(shifts)
    ]
