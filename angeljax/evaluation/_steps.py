"""The compiled steps of an evaluation, and the shapes they run with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from angeljax.evaluation.text import Windows

# What the logits of one batch may take in float32 when the caller names no batch size.
_LOGITS_BUDGET = 256 * 2**20

LogitsFn = Callable[[Any, Array], Array]
"""A language model: `logits_fn(params, tokens[B, T]) -> logits[B, T, V]`.

Logits at position t predict the token at t + 1 and depend on no later one. The function
must be jittable and hashable, and compiled steps are kept by it: pass the same object
at every call, not a new lambda.
"""


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    logits_fn: LogitsFn,
    reference_fn: LogitsFn | None,
    params: Any,
    reference: Any,
    tokens: Array,
    score_mask: Array,
) -> dict[str, Array]:
    """Sums over each window's scored tokens, float32 `[B]`.

    `reference` is a params tree for `reference_fn`; without one it is None or a batch
    of a cache: `(log_probs, top1)`.
    """
    mask = score_mask[:, 1:]

    def total(values: Array) -> Array:
        # Selected, not multiplied: padding may be infinite and must still not count.
        return jnp.where(mask, values.astype(jnp.float32), 0.0).sum(axis=1)

    logits = _predictions(logits_fn(params, tokens))
    log_probs = jax.nn.log_softmax(logits)
    target = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    sums = {"nll": total(-target)}
    if reference is None:
        return sums

    if reference_fn is not None:
        expected_logits = _predictions(reference_fn(reference, tokens))
        expected = jax.nn.log_softmax(expected_logits)
        expected_top1 = argmax(expected_logits)
    else:
        rounded, expected_top1 = reference
        expected = jax.nn.log_softmax(rounded.astype(jnp.float32), axis=-1)
    probs = jnp.exp(expected)
    # 0 * log 0 is 0, also where the model gives the token no chance either.
    terms = jnp.where(probs > 0, probs * (expected - log_probs), 0.0)
    sums["kl"] = total(terms.sum(axis=-1))
    sums["top1"] = total(argmax(logits) == expected_top1)
    return sums


@functools.partial(jax.jit, static_argnums=0)
def predict(logits_fn: LogitsFn, params: Any, tokens: Array) -> tuple[Array, Array]:
    """Log-probabilities, float16 `[B, T - 1, V]`, and the likeliest token."""
    logits = _predictions(logits_fn(params, tokens))
    return jax.nn.log_softmax(logits).astype(jnp.float16), argmax(logits)


def _predictions(logits: Array) -> Array:
    """Float32 `[B, T - 1, V]`; the last position predicts nothing we know."""
    return logits[:, :-1].astype(jnp.float32)


def argmax(logits: Array, block: int = 256) -> Array:
    """`jnp.argmax` over the last axis, ties included; int32.

    XLA's own reduction is scalar code on a CPU. A maximum is not, so look for the best
    block first and then inside it: 50 times faster over a vocabulary of 49152.
    """
    size = logits.shape[-1]
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -size % block)]
    padded = jnp.pad(logits, padding, constant_values=-jnp.inf)
    blocks = padded.reshape(*logits.shape[:-1], -1, block)
    best = blocks.max(axis=-1).argmax(axis=-1)
    inside = jnp.take_along_axis(blocks, best[..., None, None], axis=-2)[..., 0, :]
    return (best * block + inside.argmax(axis=-1)).astype(jnp.int32)


def check(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    tokens, score_mask = (np.asarray(array) for array in windows)
    if tokens.ndim != 2 or tokens.shape != score_mask.shape:
        raise ValueError(
            f"windows are tokens and a mask of one shape [N, T], not {tokens.shape} "
            f"and {score_mask.shape}"
        )
    if score_mask[:, 0].any():
        raise ValueError("nothing predicts the first token of a window: unmask others")
    if not score_mask.any():
        raise ValueError("the score mask is empty: nothing to score")
    return tokens.astype(np.int32), score_mask.astype(bool)


def vocabulary_size(logits_fn: LogitsFn, params: Any, tokens: np.ndarray) -> int:
    """Traces the model, runs nothing, and checks what it would return."""
    first = jax.ShapeDtypeStruct((1, tokens.shape[1]), jnp.int32)
    shape = jax.eval_shape(logits_fn, params, first).shape
    if len(shape) != 3 or shape[:2] != first.shape:
        raise ValueError(
            f"logits_fn must return [B, T, V]; for tokens {first.shape} it gave {shape}"
        )
    if tokens.max() >= shape[2]:
        raise ValueError(
            f"token {tokens.max()} is outside the model's vocabulary of {shape[2]}"
        )
    return shape[2]


def choose_batch_size(
    tokens: np.ndarray, vocabulary: int, requested: int | None
) -> int:
    """`requested`, or what the budget allows; never more than there are windows."""
    count, length = tokens.shape
    if requested is None:
        requested = max(_LOGITS_BUDGET // (4 * length * vocabulary), 1)
    if requested < 1:
        raise ValueError(f"batch_size must be positive, not {requested}")
    return min(requested, count)


def take_batch(array: np.ndarray, start: int, size: int) -> np.ndarray:
    """`size` rows from `start`, filled up with zeros: every step has one shape."""
    rows = array[start : start + size]
    missing = size - len(rows)
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
