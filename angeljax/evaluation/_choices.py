"""How choices are put into batches of few shapes, and the compiled step over one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from angeljax.evaluation._steps import LogitsFn
from angeljax.evaluation.encoding import EncodedTask

# Requests that differ in nothing but their last token run as one row: the letters of a
# lettered question, yes and no. A row has room for so many.
ALTERNATIVES = 8
# Positions whose logits are in float32 at a time; every length is a multiple.
_CHUNK = 32
_SHORTEST = 64
# What the logits of one batch may take in float32 when the caller names no size.
_LOGITS_BUDGET = 256 * 2**20
_MOST_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Rows:
    """Inputs of the model, each with the requests that it answers.

    Attributes:
      inputs: ids of a row, `[length]` each: a request without its last token.
      starts: int32 `[rows]`, position that predicts the first token of the choice.
      last: int32 `[rows, ALTERNATIVES]`, last tokens.
      requests: int64 `[rows, ALTERNATIVES]`, the request of each last token, or -1.
      truncated: requests whose context was too long for the model.
    """

    inputs: list[np.ndarray]
    starts: np.ndarray
    last: np.ndarray
    requests: np.ndarray
    truncated: int


def make_rows(task: EncodedTask, max_length: int | None) -> Rows:
    """Takes requests with the same inputs together.

    Raises:
      ValueError: a choice by itself is longer than `max_length`.
    """
    rows: dict[tuple[bytes, int], list[list[int]]] = {}
    inputs, truncated = [], 0
    for request in range(task.requests):
        ids = task.tokens[task.offsets[request] : task.offsets[request + 1]]
        start = int(task.choice_starts[request])
        excess = 0 if max_length is None else max(len(ids) - 1 - max_length, 0)
        if excess >= start:
            raise ValueError(
                f"task {task.name}: a choice of {len(ids) - start} tokens leaves no "
                f"room for a context in max_length={max_length}"
            )
        truncated += excess > 0
        ids, start = ids[excess:], start - excess
        groups = rows.setdefault((ids[:-1].tobytes(), start), [])
        if not groups or len(groups[-1]) == ALTERNATIVES:
            groups.append([])
        groups[-1].append(request)
    starts, requests = [], []
    for (content, start), groups in rows.items():
        for group in groups:
            inputs.append(np.frombuffer(content, task.tokens.dtype))
            starts.append(start - 1)
            requests.append(group + [-1] * (ALTERNATIVES - len(group)))
    table = np.asarray(requests, np.int64)
    last = np.where(table >= 0, task.tokens[task.offsets[table + 1] - 1], 0)
    return Rows(inputs, np.asarray(starts, np.int32), last, table, truncated)


def padded_length(length: int) -> int:
    """The next power of two, 64 at least: so few shapes are compiled."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def plan(
    lengths: np.ndarray, vocabulary: int, tokens_per_batch: int | None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Row numbers, rows and length of each batch, the longest first.

    Shorter rows fill up the last batch of a length, so that a length with few rows
    costs no batch and no compilation of its own.
    """
    if tokens_per_batch is None:
        tokens_per_batch = min(_LOGITS_BUDGET // (4 * vocabulary), _MOST_TOKENS)
    elif tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be positive, not {tokens_per_batch}")
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]))
        size = min(max(tokens_per_batch // length, 1), len(order))
        yield order[start : start + size], size, length
        start += size


def fill(
    rows: Rows, chosen: np.ndarray, size: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of one batch: what `score_choices` takes after the params."""
    inputs = np.zeros((size, length), np.int32)
    # A row of padding scores its first position, whatever comes of it.
    starts, ends = np.zeros(size, np.int32), np.zeros(size, np.int32)
    last = np.zeros((size, ALTERNATIVES), np.int32)
    for i, row in enumerate(chosen):
        ids = rows.inputs[row]
        inputs[i, : len(ids)] = ids
        ends[i] = len(ids) - 1
    starts[: len(chosen)] = rows.starts[chosen]
    last[: len(chosen)] = rows.last[chosen]
    return inputs, starts, ends, last


@functools.partial(jax.jit, static_argnums=0)
def score_choices(
    logits_fn: LogitsFn,
    params: Any,
    inputs: Array,
    starts: Array,
    ends: Array,
    last: Array,
) -> tuple[Array, Array]:
    """Log-likelihoods of choices, and whether greedy decoding would write them.

    Position t predicts token t + 1. The tokens of a choice are predicted at `starts` to
    `ends`; all but the last of them are among the inputs. The logits stay in the
    model's dtype but for a few positions at a time.

    Args:
      logits_fn: the model.
      params: its params.
      inputs: int32 `[B, T]`, padded on the right.
      starts: int32 `[B]`.
      ends: int32 `[B]`, the last position that is no padding.
      last: int32 `[B, A]`, last tokens to choose from.

    Returns:
      float32 and bool, `[B, A]`. A tie for the highest logit counts as greedy.
    """
    logits = logits_fn(params, inputs)
    targets = jnp.roll(inputs, -1, axis=1)
    positions = jnp.arange(inputs.shape[1])
    scored = (positions >= starts[:, None]) & (positions < ends[:, None])

    def chunk(start: Array) -> tuple[Array, Array]:
        def cut(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, _CHUNK, axis=1)

        found, best = _log_probs(cut(logits), cut(targets)[..., None])
        mask = cut(scored)
        total = jnp.where(mask, found[..., 0], 0.0).sum(axis=1)
        return total, (best[..., 0] | ~mask).all(axis=1)

    totals, greedy = jax.lax.map(chunk, jnp.arange(0, inputs.shape[1], _CHUNK))
    at_end = jnp.take_along_axis(logits, ends[:, None, None], axis=1)[:, 0]
    found, best = _log_probs(at_end, last)
    return totals.sum(axis=0)[:, None] + found, greedy.all(axis=0)[:, None] & best


def _log_probs(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """Log-probability of some tokens, and whether none is likelier; last axis."""
    values = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(values, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(values, tokens, axis=-1)
    return chosen - normaliser, chosen >= values.max(axis=-1, keepdims=True)
