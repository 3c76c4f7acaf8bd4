"""Random block lists, and attention over them in plain numpy, query by query."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockLists


def random_lists(
    rng: np.random.Generator,
    batch: int,
    heads: int,
    q_length: int,
    k_length: int,
    block_q: int,
    block_k: int,
    density: float,
    q_offset: Any = 0,
) -> BlockLists:
    """Ascending lists of random causal blocks, with those that hold their own queries.

    Args:
      rng: source of randomness.
      batch, heads: of the lists.
      q_length, k_length: rows of q and k.
      block_q, block_k: rows of a block.
      density: share of the blocks before the diagonal that is taken; 1 takes all, 0
        only the diagonal.
      q_offset: position of the first query, an integer or one for each row of `batch`.

    Returns:
      Lists no wider than the longest. What stands behind `counts` is rubbish.
    """
    offsets = np.broadcast_to(np.asarray(q_offset), (batch,))
    blocks = -(-q_length // block_q)
    chosen: list[list[int]] = []
    for row in range(batch):
        for _ in range(heads):
            for i in range(blocks):
                start = int(offsets[row]) + i * block_q
                end = int(offsets[row]) + min((i + 1) * block_q, q_length) - 1
                own = range(start // block_k, end // block_k + 1)
                before = [j for j in range(own.start) if rng.random() < density]
                chosen.append(before + list(own))
    width = max(map(len, chosen))
    indices = rng.choice([-1, 2**30], (len(chosen), width)).astype(np.int32)
    for line, blocks_of_line in zip(indices, chosen, strict=True):
        line[: len(blocks_of_line)] = blocks_of_line
    counts = np.asarray([len(c) for c in chosen], np.int32)
    shape = (batch, heads, blocks)
    return BlockLists(
        jnp.asarray(indices.reshape(*shape, width)),
        jnp.asarray(counts.reshape(shape)),
        block_q,
        block_k,
    )


def random_qkv(
    rng: np.random.Generator,
    batch: int,
    q_length: int,
    k_length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standard normal `q [B, T, H, D]` and `k, v [B, S, Hkv, D]`."""
    q = rng.standard_normal((batch, q_length, heads, dim), np.float32)
    k, v = (
        rng.standard_normal((batch, k_length, kv_heads, dim), np.float32)
        for _ in range(2)
    )
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def oracle(
    q: Any,
    k: Any,
    v: Any,
    lists: BlockLists,
    *,
    q_offset: Any = 0,
    lengths: Any = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the listed keys, one query at a time, in float64.

    Returns:
      y `[B, T, H, D]`, 0 where a query sees no key, and lse `[B, H, T]`, -inf there.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    batch, t, heads, dim = q.shape
    s, kv_heads = k.shape[1:3]
    indices, counts = np.asarray(lists.indices), np.asarray(lists.counts)
    offsets = np.broadcast_to(np.asarray(q_offset), (batch,))
    ends = np.broadcast_to(np.asarray(s if lengths is None else lengths), (batch,))
    scale = dim**-0.5 if scale is None else scale
    y, lse = np.zeros(q.shape), np.full((batch, heads, t), -np.inf)
    for b in range(batch):
        line_b = b if indices.shape[0] > 1 else 0
        for h in range(heads):
            line_h = h * indices.shape[1] // heads
            for i in range(t):
                position = int(offsets[b]) + i
                if position >= ends[b]:
                    continue
                line = line_b, line_h, i // lists.block_q
                keys = [
                    key
                    for j in indices[line][: counts[line]]
                    for key in range(j * lists.block_k, (j + 1) * lists.block_k)
                    if key <= position
                ]
                if not keys:
                    continue
                kv = h // (heads // kv_heads)
                logits = k[b, keys, kv] @ q[b, i, h] * scale
                if soft_cap is not None:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                top = logits.max()
                weights = np.exp(logits - top)
                y[b, i, h] = weights @ v[b, keys, kv] / weights.sum()
                lse[b, h, i] = top + np.log(weights.sum())
    return y, lse
