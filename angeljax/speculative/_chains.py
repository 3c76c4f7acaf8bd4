"""Chains: drafts that are drawn one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.speculative.drafter import Draft


def draw_chain(
    choose: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]],
    read: Callable[[Any, jax.Array, jax.Array], Any],
    carry: Any,
    lengths: jax.Array,
    num_tokens: int,
    *,
    unroll: bool = False,
) -> tuple[Draft, Any]:
    """Draws, reads what was drawn, and so on; the last is not read.

    Args:
      choose: of a carry and the position `[B]` of the token that is wanted: tokens
        `[B, 1]` and log-probabilities `[B, 1, V]`, or None; see `Sampler.draft`.
      read: of a carry, tokens `[B, 1]` and their positions `[B]`: the next carry.
      carry: pytree, such as logits and a cache.
      lengths: int32 `[B]`, the position of the first draft.
      num_tokens: how many are drawn.
      unroll: for what reads in a few kernels: XLA then joins some of them.

    Returns:
      The draft and the carry after the last token but one was read.
    """

    def step(state: Any, _: None) -> tuple[Any, Any]:
        carry, at = state
        new, log_q = choose(carry, at)
        return (read(carry, new, at), at + 1), (new[:, 0], log_q)

    first = carry, lengths
    (carry, at), drawn = jax.lax.scan(step, first, length=num_tokens - 1, unroll=unroll)
    new, log_q = choose(carry, at)
    last = new[:, 0], log_q
    drawn = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), drawn, last)
    return chain_draft(drawn), carry


def chain_draft(drawn: tuple[jax.Array, jax.Array | None], cache: Any = None) -> Draft:
    """A draft of tokens `[T, B]` and log-probabilities `[T, B, 1, V]`, or None."""
    tokens, log_q = drawn
    log_probs = None if log_q is None else jnp.swapaxes(log_q[:, :, 0], 0, 1)
    return Draft(tokens.T, log_probs=log_probs, cache=cache)
