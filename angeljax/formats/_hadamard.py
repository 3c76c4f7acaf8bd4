"""Hadamard matrices: +-1 with orthogonal rows, of sizes beyond powers of two.

From finite fields (Paley, 1933): the character chi of GF(q), 1 for squares and -1 for
the rest, makes the matrix Q with entries chi(a - b). For q = 3 mod 4 there is one of
size q + 1, for q = 1 mod 4 one of size 2 (q + 1). Kronecker products make more.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

# Size -> the field that it comes from; no multiples of smaller ones. 92, 116, 156, 172
# and 188 need other means than Paley's (Williamson, Baumert and Hall): left out.
_PALEY_1 = {12: 11, 20: 19, 28: 27, 44: 43, 60: 59, 68: 67, 84: 83, 108: 107,
            132: 131, 140: 139, 164: 163, 180: 179}  # fmt: skip
_PALEY_2 = {36: 17, 52: 25, 76: 37, 100: 49, 124: 61, 148: 73, 196: 97}
# x^n = the sum of these times 1, x, ... x^(n - 1), irreducible over GF(p).
_FIELDS = {25: (5, (2, 0)), 27: (3, (2, 1, 0)), 49: (7, (3, 0))}


def _bases() -> tuple[int, ...]:
    """Sizes that are made from a field."""
    return tuple(sorted({*_PALEY_1, *_PALEY_2}))


@functools.cache
def factor_sizes(n: int) -> tuple[int, ...] | None:
    """Sizes of matrices known here whose Kronecker product has size n, or None."""
    if n < 1:
        return None
    if n & (n - 1) == 0:
        return (n,)
    for base in reversed(_bases()):
        if n % base == 0:
            rest = factor_sizes(n // base)
            if rest is not None:
                return tuple(x for x in (base, *rest) if x > 1)
    return None


def largest_known(k: int) -> int:
    """The largest size known here that divides k; 1 divides everything."""
    small = [d for d in range(1, int(k**0.5) + 1) if k % d == 0]
    divisors = sorted({*small, *(k // d for d in small)}, reverse=True)
    return next(d for d in divisors if factor_sizes(d) is not None)


@functools.cache
def hadamard_matrix(n: int) -> np.ndarray:
    """A Hadamard matrix `[n, n]` of +-1, float32.

    Powers of two are Sylvester's and symmetric; others are Kronecker products of those
    of `factor_sizes`.

    Raises:
      ValueError: none of this size is known here.
    """
    sizes = factor_sizes(n)
    if sizes is None:
        raise ValueError(
            f"no Hadamard matrix of size {n} is known here: use a power of two, or one "
            f"times {', '.join(map(str, _bases()[:8]))} ..."
        )
    h = np.ones((1, 1), np.float32)
    for size in sizes:
        h = np.kron(h, _one(size))
    h.flags.writeable = False
    return h


def _one(n: int) -> np.ndarray:
    if n & (n - 1) == 0:
        h = np.ones((1, 1), np.float32)
        while len(h) < n:
            h = np.block([[h, h], [h, -h]])
        return h
    return _paley_1(_PALEY_1[n]) if n in _PALEY_1 else _paley_2(_PALEY_2[n])


def _paley_1(q: int) -> np.ndarray:
    """Size q + 1 for q = 3 mod 4: the unit matrix and a skew one."""
    s = np.zeros((q + 1, q + 1), np.float32)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _character(q)
    return s + np.eye(q + 1, dtype=np.float32)


def _paley_2(q: int) -> np.ndarray:
    """Size 2 (q + 1) for q = 1 mod 4: a symmetric conference matrix, doubled."""
    c = np.zeros((q + 1, q + 1), np.float32)
    c[0, 1:] = c[1:, 0] = 1
    c[1:, 1:] = _character(q)
    plus = np.asarray([[1, 1], [1, -1]], np.float32)
    diagonal = np.asarray([[1, -1], [-1, -1]], np.float32)
    return np.kron(c, plus) + np.kron(np.eye(q + 1, dtype=np.float32), diagonal)


def _character(q: int) -> np.ndarray:
    """chi(a - b) for all pairs of a field of q elements."""
    p, reduce = _FIELDS.get(q, (q, (0,)))
    n = len(reduce)
    # Elements are polynomials, their coefficients the digits of a number to base p.
    digits = np.stack([np.arange(q) // p**i % p for i in range(n)], axis=-1)
    powers = p ** np.arange(n)
    squares = np.zeros((q, 2 * n - 1), int)
    for i, j in itertools.product(range(n), repeat=2):
        squares[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * n - 2, n - 1, -1):
        for i, r in enumerate(reduce):
            squares[:, top - n + i] += squares[:, top] * r
    chi = -np.ones(q, np.float32)
    chi[squares[:, :n] % p @ powers] = 1
    chi[0] = 0
    return chi[(digits[:, None] - digits[None]) % p @ powers]
