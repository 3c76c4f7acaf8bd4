"""Where two texts of the same prompts part, and how close the choice was there.

Programs of other widths multiply matrices in another order, so that logits differ in
their last bits. Two texts may then part where two tokens are as good as equal, and
nowhere else: a gap beyond rounding is a bug.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.speculative import _check
from angeljax.speculative._rows import chain_mask
from angeljax.speculative.core import GREEDY, Generated
from angeljax.speculative.drafter import TargetModel
from angeljax.speculative.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two texts part.

    Attributes:
      row: of the batch.
      index: of the first generated token that differs.
      tokens: what the two have there; -1 where one had ended.
      gap: by how much the better of the two is better for the model: a difference of
        logits over the temperature, with the noise of the position when sampling.
        Infinite where a filter keeps only one of them, or where one text had ended.
    """

    row: int
    index: int
    tokens: tuple[int, int]
    gap: float


def divergences(
    model: TargetModel,
    params: Any,
    prompts: Any,
    first: Generated,
    second: Generated,
    lengths: Any = None,
    *,
    sampling: Sampling = GREEDY,
) -> list[Divergence]:
    """Compares two texts, row by row.

    Args:
      model, params, prompts, lengths, sampling: what both were generated with.
      first, second: of `generate` or `autoregressive`.

    Returns:
      One entry for each row in which they differ; [] if the texts are the same.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import PromptLookup, autoregressive, generate
      >>> from angeljax.speculative import divergences
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> run = model, params, [[1, 2, 1]]
      >>> plain = autoregressive(*run, max_new_tokens=8)
      >>> fast = generate(*run, drafter=PromptLookup(2), max_new_tokens=8)
      >>> divergences(*run, plain, fast)
      []
    """
    tokens, sizes = _check.prompts(model, prompts, lengths)
    texts = [np.asarray(out.tokens) for out in (first, second)]
    ends = np.stack([np.asarray(out.lengths) for out in (first, second)])
    place = np.arange(texts[0].shape[1])
    texts = [
        np.where(place < n[:, None], t, -1) for t, n in zip(texts, ends, strict=True)
    ]
    rows = [r for r in range(len(sizes)) if (texts[0][r] != texts[1][r]).any()]
    if not rows:
        return []
    index = np.asarray([np.argmax(texts[0][r] != texts[1][r]) for r in rows])
    sampler = sampling.sampler(len(sizes))
    sampler = dataclasses.replace(sampler, keys=sampler.keys[jnp.asarray(rows)])
    count = _check.bucket(int((sizes[rows] + index).max()))
    read = np.zeros((len(rows), count), np.int32)
    for line, row, at in zip(read, rows, index, strict=True):
        both = np.concatenate([tokens[row, : sizes[row]], texts[0][row, :at]])
        line[: len(both)] = both
    scores = _scores(model, params, sampler, read, jnp.asarray(sizes[rows] + index))
    found = []
    for line, row, at in zip(np.asarray(scores), rows, index, strict=True):
        pair = int(texts[0][row, at]), int(texts[1][row, at])
        gap = np.inf
        if min(pair) >= 0 and np.isfinite(line[list(pair)]).all():
            gap = abs(float(line[pair[0]] - line[pair[1]]))
        found.append(Divergence(row, int(at), pair, float(gap)))
    return found


@functools.partial(jax.jit, static_argnames=("model",))
def _scores(
    model: Any, params: Any, sampler: Any, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    batch, count = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(count), (batch, count))
    rows = model.read_rows(
        params,
        model.init_rows(batch, count),
        tokens,
        positions=positions,
        slots=jnp.zeros(batch, jnp.int32),
        mask=chain_mask(positions, count),
    )
    last = jnp.take_along_axis(rows.final, lengths[:, None, None] - 1, axis=1)
    logits = model.head_rows(params, last)
    return sampler.scores(logits, lengths[:, None])[:, 0]
