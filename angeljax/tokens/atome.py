"""`atome`: pairs of similar neighbours become one token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _merging
from angeljax.tokens._attention_weights import Heads
from angeljax.tokens._grouping import adjacent_cosine, check_threshold
from angeljax.tokens._merging import (
    Attention,
    Clips,
    Options,
    Pruner,
    Rounding,
    Weights,
)
from angeljax.tokens._selection import Selection


def atome(
    embeds: jax.Array,
    *,
    keep: int | float,
    importance: jax.Array | None = None,
    mask: jax.Array | None = None,
    attn: Attention | None = None,
    weights: Weights = "uniform",
    pruner: Pruner | None = None,
    threshold: float | jax.Array = 0.85,
    relevance: Heads = "mean",
    weight: float = 0.5,
    rounding: Rounding = "round",
    least: int = 1,
) -> Selection:
    """Adjacent token merging: the most similar of the pairs (0, 1), (2, 3), ...

    The pairs with the highest cosine become the mean of their two tokens, as many as
    the budget asks for. One round cannot keep less than half; where the budget is
    smaller, further rounds pair what came out of the one before, and a token is the
    mean of all tokens that went into it.

    With a pruner one round merges only pairs above the threshold, and the pruner keeps
    T of what comes out, as `samp` does.

    Source: A-ToMe (arXiv 2306.16009) as AngelSlim applies it, once and before the
    language model. The paper merges inside of the encoder's layers, on their keys.
    AngelSlim's second round for Kimi-Audio takes means of means.

    Args:
      embeds: `[B, N, D]` or `[N, D]`, tokens of audio.
      keep: T as a count, or as a share of the real tokens of each row.
      importance, mask, attn, relevance, weight, rounding, least: as in `samp`.
      weights: "uniform", or "attention" for means by the attention that tokens receive.
      pruner: None, "dpp" or "mmr". Without attention and importance all tokens are
        equally relevant to it.
      threshold: a cosine, with a pruner only.

    Returns:
      A `Selection` with `merged` rows; `indices` are the first tokens of their pairs.

    Raises:
      ValueError: as `samp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import atome
      >>> x = jnp.array([[1, 0], [1, 0.25], [1, 0.5], [0, 1], [-1, 0.5]])
      >>> chosen = atome(x, keep=4)
      >>> chosen.indices.tolist(), chosen.merged[0].tolist()
      ([0, 2, 3, 4], [1.0, 0.125])
    """
    check_threshold(threshold)
    options = Options(
        keep=keep,
        weights=weights,
        relevance=relevance,
        pruner=pruner,
        weight=weight,
        rounding=rounding,
        least=least,
    )
    return _atome(embeds, importance, mask, attn, threshold, options)


# Outside of a `jit`, one program instead of many small ones.
@functools.partial(jax.jit, static_argnames="options")
def _atome(
    embeds: jax.Array,
    importance: jax.Array | None,
    mask: jax.Array | None,
    attn: Attention | None,
    threshold: float | jax.Array,
    options: Options,
) -> Selection:
    clips = Clips.of(embeds, mask, options)
    heavy, relevant = _merging.token_weights(clips, attn, importance, options)
    n = clips.mask.shape[1]
    place = jnp.arange(n, dtype=jnp.int32)
    owner = jnp.where(clips.mask, place, n)
    leaders = clips.mask
    if options.pruner is None:
        for _ in range(_rounds(options.kept_of(n))):
            owner, leaders = _round(clips, heavy, owner, leaders, None)
    else:
        owner, leaders = _round(clips, heavy, owner, leaders, threshold)
    rows = _merging.merge(clips.embeds, heavy, owner)
    if options.pruner is None:
        order = _merging.first_of(leaders, clips.num_keep)
    else:
        relevant = _merging.mean_of(relevant, owner)
        order = _merging.choose(clips, rows, relevant, leaders, options)
    return clips.selection(order, rows)


def _round(
    clips: Clips,
    weights: jax.Array,
    owner: jax.Array,
    leaders: jax.Array,
    threshold: float | jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One round of merging pairs of what `leaders` stand for."""
    n = leaders.shape[1]
    now = _merging.first_of(leaders, n)  # their places, N after the last
    length = jnp.sum(leaders, axis=-1, dtype=jnp.int32)
    rows = _merging.merge(jax.lax.stop_gradient(clips.embeds), weights, owner)
    rows = jnp.take_along_axis(rows, now[..., None], axis=1, mode="fill", fill_value=0)
    cosine = adjacent_cosine(rows)
    pairs = jnp.arange(n - 1) % 2 == 0
    pairs = pairs & (jnp.arange(1, n) < length[:, None])
    if threshold is not None:
        pairs &= cosine > threshold
    excess = length - clips.counts
    merged = _merging.ranks(cosine, pairs, descending=True) < excess[:, None]
    merged = jnp.pad(merged & pairs, ((0, 0), (1, 0)))  # with the one before
    # Second tokens of a pair, at their places, take the owner of the first.
    before = jnp.pad(now[:, :-1], ((0, 0), (1, 0)))
    batch = jnp.arange(len(now))[:, None]
    target = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), now.shape)
    target = target.at[batch, now].set(jnp.where(merged, before, now), mode="drop")
    owner = jnp.take_along_axis(target, owner, axis=1, mode="fill", fill_value=n)
    return owner, leaders & (target == jnp.arange(n))


def _rounds(kept_of: np.ndarray) -> int:
    """Rounds until every possible number of tokens fits its budget."""
    most = 0
    for length, kept in enumerate(kept_of):
        rounds = 0
        while length > kept:
            length, rounds = max(kept, -(-length // 2)), rounds + 1
        most = max(most, rounds)
    return most
