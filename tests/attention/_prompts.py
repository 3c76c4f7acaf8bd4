"""Queries and keys with topics, and how selectors are held to their oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention._selector import Place

# Rows of a batch, the real ones of each, query and key heads, head size.
ROWS, LENGTHS, HEADS, KV_HEADS, DIM = 87, (87, 52), 6, 2, 8
# (q [n, H, D], k [S, Hkv, D], position of the first query) -> bool [H, n_q, n_k]
Oracle = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def prompt(
    seed: int = 0, rows: int = ROWS, batch: int = 2, sharp: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q `[B, rows, H, D]`, k and v `[B, rows, Hkv, D]` with scores far apart.

    Tokens belong to topics that come back, the first token draws everybody, and heads
    differ in how much they follow either.
    """
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((6, DIM)) * sharp
    topic = np.repeat(rng.integers(0, 6, (batch, -(-rows // 9))), 9, 1)[:, :rows]
    k = topics[topic][:, :, None] + 0.7 * rng.standard_normal(
        (batch, rows, KV_HEADS, DIM)
    )
    taste = rng.uniform(0.2, 2.0, (HEADS, 1))
    q = topics[topic][:, :, None] * taste
    q = q + rng.standard_normal((batch, rows, HEADS, DIM))
    k[:, 0] += q.mean((1, 2))[:, None]
    v = rng.standard_normal(k.shape)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))  # type: ignore


def spoil(x: jax.Array, lengths: tuple[int, ...] = LENGTHS) -> jax.Array:
    """NaN behind the real rows: nothing may look there."""
    real = np.arange(x.shape[1]) < np.asarray(lengths)[:, None]
    return jnp.where(real[..., None, None], x, jnp.nan)


def check(selector: Any, oracle: Oracle, seed: int = 0, **options: Any) -> np.ndarray:
    """A padded batch in `jit` against the oracle of each row; gives the counts."""
    q, k, v = prompt(seed, **options)
    place = Place(lengths=jnp.asarray(LENGTHS))
    lists = jax.jit(lambda *x: selector.select(*x, place))(*map(spoil, (q, k, v)))
    block = selector.block_size
    blocks = -(-q.shape[1] // block)
    mask = np.asarray(lists.to_mask(blocks))
    assert lists.block_q == lists.block_k == block and mask.shape[:2] == (2, HEADS)
    for b, length in enumerate(LENGTHS):
        expected = oracle(np.asarray(q[b, :length]), np.asarray(k[b, :length]), 0)
        n = expected.shape[1]
        np.testing.assert_array_equal(mask[b, :, :n, :n], expected)
        assert not mask[b, :, :n, n:].any()
        # Padding reads its own block and nothing else.
        np.testing.assert_array_equal(
            mask[b, :, n:],
            np.broadcast_to(np.eye(blocks, dtype=bool)[n:], mask[b, :, n:].shape),
        )
    return np.asarray(lists.counts)


def chunks(selector: Any, q: Any, k: Any, v: Any, size: int, total: int) -> np.ndarray:
    """The mask of a prompt that comes in chunks, the keys to come being NaN."""
    block = selector.block_size
    blocks = -(-q.shape[1] // block)

    def select(q: Any, k: Any, start: Any) -> Any:
        place = Place(q_offset=start, total=total)
        return selector.select(q, k, k, place).to_mask(blocks)

    run, parts = jax.jit(select), []
    for start in range(0, q.shape[1], size):
        there = spoil(k, (start + size,) * k.shape[0])
        parts.append(run(q[:, start : start + size], there, start))
    return np.asarray(jnp.concatenate(parts, 2))


def heaviest(score: np.ndarray, forced: np.ndarray, budget: int) -> np.ndarray:
    """bool `[n]`: the forced entries, then the highest, `budget` in all."""
    keep = forced.copy()
    for j in np.argsort(-score, kind="stable"):
        if keep.sum() >= budget:
            break
        keep[j] = True
    return keep


def softmax(x: np.ndarray) -> np.ndarray:
    """Of a vector."""
    e = np.exp(x - x.max())
    return e / e.sum()
