"""Sets of blocks as words: the best of each row, cumulative mass, and lists."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _words
from pallas_kernels import BlockLists


def _bits(words: Any, n: int) -> np.ndarray:
    """bool `[..., n]`: bit b of word w is block 32 w + b."""
    split = np.asarray(words)[..., None] >> np.arange(32, dtype=np.uint32) & 1
    return split.reshape(*split.shape[:-2], -1)[..., :n].astype(bool)


def test_best_are_the_first_of_a_stable_sort(rng: np.random.Generator) -> None:
    """With many equal keys, budgets of nothing and of everything, and lists of them."""
    n = 70
    key = rng.integers(1, 40, (3, 4, n))
    budget = rng.integers(0, n + 1, (3, 4)).astype(np.int32)
    budget[0, :2] = 0, n
    want = np.zeros(key.shape, bool)
    for row in np.ndindex(3, 4):
        want[row][np.argsort(-key[row], kind="stable")[: budget[row]]] = True

    @jax.jit
    def run(key: jax.Array, budget: jax.Array) -> tuple[jax.Array, BlockLists]:
        words = _words.best(key.astype(jnp.uint16), budget)
        return _words.count(words), _words.lists(words[None], n, 64)

    counts, lists = run(key, budget)
    assert np.array_equal(counts, budget)
    assert np.array_equal(lists.counts[0], budget)
    for row in np.ndindex(3, 4):
        found = np.asarray(lists.indices)[0][row][: budget[row]]
        assert np.array_equal(found, np.flatnonzero(want[row]))


def test_mass_is_taken_until_it_is_enough(rng: np.random.Generator) -> None:
    """Sixteenths add up exactly: equal sums and ties are decided by the rule."""
    n, rows = 40, 60
    mass = rng.integers(0, 6, (rows, n)) / 16.0
    before = rng.integers(0, 8, rows) / 16.0
    required = rng.integers(0, 100, rows) / 16.0
    required[0], required[1] = np.inf, 0
    want = np.zeros(mass.shape, bool)
    for r in range(rows):
        total = before[r]
        for j in np.argsort(-mass[r], kind="stable"):
            want[r, j] = total < required[r]
            total += mass[r, j]

    @jax.jit
    def run(*args: jax.Array) -> jax.Array:
        mass, before, required = args
        return _words.until(_words.order32(mass) + 1, mass, before, required)

    words = run(*(x.astype(np.float32) for x in (mass, before, required)))
    assert np.array_equal(_bits(words, n), want)


def test_keys_have_the_order_of_scores(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.normal(size=500) * 10.0 ** rng.integers(-7, 7, 500)])
    x = np.append(x, [0.0, -0.0, 1e30, -1e30, 65504, np.inf]).astype(np.float32)
    key = np.asarray(jax.jit(_words.order16)(x)).astype(np.int64)
    half = np.clip(x, -65504, 65504).astype(np.float16).astype(np.float64)
    order = np.argsort(half, kind="stable")
    rise, keys = np.diff(half[order]), np.diff(key[order])
    assert (np.sign(rise) == np.sign(keys)).all()
    assert 0 < key.min() and key.max() < _words.FIRST


def test_spans(rng: np.random.Generator) -> None:
    low, high = rng.integers(-5, 110, (2, 50))
    words = jax.jit(lambda *a: _words.span(*a, 4))(low, high)
    assert words.shape == (50, 4)
    blocks = np.arange(128)
    want = (blocks >= low[:, None]) & (blocks < high[:, None])
    assert np.array_equal(_bits(words, 128), want)
    assert np.array_equal(jax.jit(_words.pack)(want), words)
