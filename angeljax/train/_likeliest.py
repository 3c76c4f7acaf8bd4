"""A teacher's likeliest entries, row by row of a token stream."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _shards
from angeljax.models.language_model import LanguageModel
from angeljax.train.chunked import head_logits

# float32 logits that exist at once
_CHUNK_LOGITS = 2**27
_BLOCK = 32


def likeliest(
    model: LanguageModel,
    params: Any,
    ids: np.ndarray,
    length: int,
    top_k: int,
    rows: range,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """What a teacher keeps of some rows.

    Args:
      model: the teacher.
      params: its params.
      ids: the token stream.
      length: inputs of a row; row i starts at token `i * length`.
      top_k: entries kept for each token.
      rows: their numbers.
      batch_size: rows at once.

    Returns:
      The fields of a `TopK` by name.
    """
    parts: list[Any] = []
    for first in range(rows.start, rows.stop, batch_size):
        # The last batch repeats its last row: every step has one shape.
        picked = np.minimum(np.arange(first, first + batch_size), rows.stop - 1)
        at = picked[:, None] * length + np.arange(length + 1)
        parts.append(_step(model, top_k, params, ids[at].astype(np.int32)))
        # One step ahead of the host, not all of them.
        if len(parts) > 1:
            parts[-2] = jax.device_get(parts[-2])
    whole = jax.tree.map(
        lambda *p: np.concatenate(p)[: len(rows)], *jax.device_get(parts)
    )
    return whole


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    model: LanguageModel, top_k: int, params: Any, tokens: jax.Array
) -> dict[str, jax.Array]:
    hidden = model.features(params, tokens[:, :-1]).final
    head, vocabulary = model.head_params(params), model.config.vocab_size
    batch, length, width = hidden.shape
    rows = max(min(_CHUNK_LOGITS // vocabulary, batch * length), 1)

    def one(inputs: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        x, gold = inputs
        log_probs = jax.nn.log_softmax(head_logits(head, x))
        values, at = top_k_of(log_probs, top_k)
        return {
            "ids": at.astype(_shards.id_dtype(vocabulary)),
            "log_probs": values.astype(jnp.float16),
            "tail": jnp.maximum(1 - jnp.exp(values).sum(), 0.0),
            "gold": log_probs[gold],
        }

    flat = hidden.reshape(-1, width), tokens[:, 1:].reshape(-1)
    found = jax.lax.map(one, flat, batch_size=rows)
    return jax.tree.map(lambda a: a.reshape(batch, length, *a.shape[1:]), found)


def top_k_of(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of a long row `[V]`.

    A GPU sorts for it. The k largest lie in the k blocks with the largest maxima, so
    that two short sorts do what one of the whole row would.
    """
    if k * _BLOCK * 2 > x.size:
        return jax.lax.top_k(x, k)
    blocks = jnp.pad(x, (0, -x.size % _BLOCK), constant_values=-jnp.inf)
    blocks = blocks.reshape(-1, _BLOCK)
    _, best = jax.lax.top_k(blocks.max(-1), k)
    values, place = jax.lax.top_k(blocks[best].reshape(-1), k)
    return values, best[place // _BLOCK] * _BLOCK + place % _BLOCK
