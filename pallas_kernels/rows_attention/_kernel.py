"""The kernel of `rows_attention`, in Pallas for Triton.

One program serves one row and one head of keys with all the query heads that share it.
It puts the new keys and values into the cache and reads them back from there, in steps
of the same slots whatever is new: a sum over keys then does not depend on how many
tokens are read together. Halves of a head are apart, as the rotation pairs them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.rows_attention._blocks import TOKENS, Blocks

_LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is specialised for.

    Attributes:
      tokens, heads, kv_heads, features, slots: T, H, Hkv, D and S.
      queries: rows of a tile.
      held: entries that go before the new ones, at most; 0 without.
      norms: whether there are scales of norms of queries and keys.
      eps: of those.
      blocks: tiles.
      barrier: whether threads must wait for each other, as they do on a device.
    """

    tokens: int
    heads: int
    kv_heads: int
    features: int
    slots: int
    queries: int
    held: int
    norms: bool
    eps: float
    blocks: Blocks
    barrier: bool

    @property
    def group(self) -> int:
        """Query heads of a head of keys."""
        return self.heads // self.kv_heads


def kernel(case: Case, *refs: Any) -> None:
    """`refs`: qkv, cos, sin, mask, slots, k, v, held ones, norms, then y, k, v."""
    qkv, cos, sin, mask, slots, _, _, *rest, y, keys, values = refs
    row, head, half = pl.program_id(0), pl.program_id(1), case.features // 2
    start = slots[row]
    lane, wide = jnp.arange(half), jnp.arange(case.features)
    q_norm = k_norm = None
    if case.norms:
        *rest, q_norm, k_norm = rest

    def rotated(
        token: jax.Array, good: jax.Array, at: jax.Array, norm: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Both halves of one head for each token, from column `at` of qkv on."""
        kept = good[:, None]
        parts = []
        for j in range(2):
            column = at[:, None] + (lane + j * half)[None, :]
            part = plt.load(qkv.at[row, token[:, None], column], mask=kept, other=0.0)
            parts.append(part.astype(jnp.float32))
        if norm is not None:
            total = sum(jnp.sum(p * p, axis=1) for p in parts)
            factor = jax.lax.rsqrt(total / case.features + case.eps)[:, None]
            for j in range(2):
                scale = norm[pl.ds(j * half, half)].astype(qkv.dtype)
                found = (parts[j] * factor).astype(qkv.dtype) * scale[None, :]
                parts[j] = found.astype(jnp.float32)
        a, b = parts
        turn = row, token[:, None], lane[None, :]
        c = plt.load(cos.at[turn], mask=kept, other=0.0)
        s = plt.load(sin.at[turn], mask=kept, other=0.0)
        return (a * c - b * s).astype(qkv.dtype), (b * c + a * s).astype(qkv.dtype)

    # Before the barrier, so that these loads do not wait for it.
    place = jnp.arange(case.queries)
    token = place % TOKENS
    member = place // TOKENS
    live = (token < case.tokens) & (member < case.group)
    at_head = (head * case.group + member) * case.features
    q1, q2 = rotated(token, live, at_head, q_norm)

    if case.held:
        hk, hv, valid = rest
        count = valid[row]
        size = max(1 << (case.held - 1).bit_length(), 2)
        entry = jnp.arange(size)
        some = ((entry < count) & (entry < case.held))[:, None]
        goal = row, head, (start - count + entry)[:, None], wide[None, :]
        at = row, head, entry[:, None], wide[None, :]
        for source, store in ((hk, keys), (hv, values)):
            moved = plt.load(source.at[at], mask=some, other=0.0)
            plt.store(store.at[goal], moved.astype(store.dtype), mask=some)

    entry = jnp.arange(TOKENS)
    new = entry < case.tokens
    column = (case.heads + head) * case.features + jnp.zeros_like(entry)
    for j, part in enumerate(rotated(entry, new, column, k_norm)):
        put: Any = (row, head, (start + entry)[:, None], (lane + j * half)[None, :])
        plt.store(keys.at[put], part.astype(keys.dtype), mask=new[:, None])
    column = column + case.kv_heads * case.features
    given = row, entry[:, None], column[:, None] + wide[None, :]
    part = plt.load(qkv.at[given], mask=new[:, None], other=0.0)
    put = row, head, (start + entry)[:, None], wide[None, :]
    plt.store(values.at[put], part.astype(values.dtype), mask=new[:, None])
    if case.barrier:
        plt.debug_barrier()

    exact = jax.lax.Precision.HIGHEST if qkv.dtype == jnp.float32 else None

    def dot(a: jax.Array, b: jax.Array, side: int) -> jax.Array:
        return jax.lax.dot_general(
            a,
            b,
            (((1,), (side,)), ((), ())),
            precision=exact,
            preferred_element_type=jnp.float32,
        )

    size = case.blocks.keys

    def step(i: jax.Array, carry: Any) -> Any:
        peak, total, acc = carry
        slot = i * size + jnp.arange(size)
        there = slot < case.slots

        def load(ref: Any, columns: jax.Array) -> jax.Array:
            at = row, head, slot[:, None], columns[None, :]
            return plt.load(ref.at[at], mask=there[:, None], other=0.0)

        k1, k2, v = load(keys, lane), load(keys, lane + half), load(values, wide)
        told = plt.load(
            mask.at[row, token[:, None], slot[None, :]],
            mask=live[:, None] & there[None, :],
            other=0,
        )
        logits = dot(q1, k1.astype(q1.dtype), 1) + dot(q2, k2.astype(q1.dtype), 1)
        logits = logits * (case.features**-0.5 * _LOG2E)
        seen = told.astype(jnp.int32) != 0
        logits = jnp.where(seen, logits, -1e30)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp2(logits - higher[:, None]), 0.0)
        fade = jnp.exp2(peak - higher)
        total = total * fade + jnp.sum(weights, axis=1)
        acc = acc * fade[:, None] + dot(weights.astype(q1.dtype), v.astype(q1.dtype), 0)
        return higher, total, acc

    # Finite, so that a row that sees nothing needs no case of its own.
    peak = jnp.full((case.queries,), -1e30, jnp.float32)
    total = jnp.zeros((case.queries,), jnp.float32)
    acc = jnp.zeros((case.queries, case.features), jnp.float32)
    # What is behind the new tokens adds zeros: it need not be read.
    end = jnp.minimum(start + case.tokens, case.slots)
    steps = (end + size - 1) // size
    _, total, acc = jax.lax.fori_loop(0, steps, step, (peak, total, acc))
    out = acc / jnp.where(total > 0, total, 1.0)[:, None]
    result = row, token[:, None], at_head[:, None] + wide[None, :]
    plt.store(y.at[result], out.astype(y.dtype), mask=live[:, None])
