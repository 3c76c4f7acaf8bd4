"""What sparse attention is told of a prefill, while tracing and by the arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention.prefill import Prefill, SparseAttention, slots_by_position
from angeljax.models.attention import dense_attention
from angeljax.models.cache import KVCache
from angeljax.models.layers import AttentionFn


def prefill_of(
    attention_fn: AttentionFn,
    windows: Sequence[int],
    scanned: bool,
    length: int,
    mask: Any,
    cache: KVCache | None,
    start: int | None,
    total: int | None,
) -> Prefill | None:
    """What is known of a prefill while tracing; None where attention is dense."""
    if not isinstance(attention_fn, SparseAttention):
        return None
    if cache is None:
        if start:
            raise ValueError(f"start={start} needs the cache with those tokens")
        start = 0
    slots = length if cache is None else cache.positions.shape[1]
    total = slots if total is None else total
    # Rows that end in padding are shorter than they look.
    least = (start or 0) + (length if mask is None else 1)
    if total < least:
        raise ValueError(
            f"total={total}: a prompt is no shorter than the {start or 0} tokens "
            f"before and the {length} of this chunk"
        )
    layers = len(windows)
    if all(windows) or (scanned and any(windows)):
        raise ValueError(
            "sparse attention is for layers without a sliding window, and "
            + (
                "every layer of this model has one: leave it out"
                if all(windows)
                else "with scan_layers all must be such: use scan_layers=False"
            )
        )
    if not attention_fn.sparse(length, total, layers):
        return None
    return Prefill(num_layers=layers, total=total, start=start)


def standing(
    prompt: Prefill | None, mask: Any, cache: KVCache | None, keys: jax.Array
) -> Prefill | None:
    """The prefill with what only the arrays tell."""
    if prompt is None or (mask is None and prompt.start is not None):
        return prompt
    if prompt.start is not None:
        lengths = prompt.start + jnp.sum(mask, axis=-1, dtype=jnp.int32)
        return dataclasses.replace(prompt, lengths=lengths)
    assert cache is not None, "only a cache leaves the start open"
    return dataclasses.replace(
        prompt,
        offset=jnp.max(cache.positions, axis=-1) + 1,
        slots=slots_by_position(keys),
        lengths=jnp.max(keys, axis=-1) + 1,
    )


def sparse_or_dense(sparse: SparseAttention) -> AttentionFn:
    """Sparse where a layer is told where its queries stand, dense under a mask."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
        if isinstance(mask, Prefill):
            return sparse(q, k, v, mask)
        return dense_attention(q, k, v, mask)

    return attend
