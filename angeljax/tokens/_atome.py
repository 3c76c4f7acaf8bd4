"""A-ToMe: pairs of similar neighbours become one token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.tokens._grouping import adjacent_cosine
from angeljax.tokens._merging import Clips, Groupings, first_of, merge, merging, ranks


@merging(weights="uniform", pruner=None)
def atome(clips: Clips) -> Groupings:
    """Adjacent token merging: the most similar of the pairs (0, 1), (2, 3), ...

    The pairs with the highest cosine become the mean of their two tokens, as many as
    the budget asks for. One round cannot keep less than half; where the budget is
    smaller, further rounds pair what came out of the one before, and a token is the
    mean of all tokens that went into it.

    With a pruner one round merges only pairs above the threshold, and the pruner keeps
    T of what comes out, as `samp` does.

    Source: A-ToMe (arXiv 2306.16009) as AngelSlim applies it, once and before the
    language model. The paper merges inside of the encoder's layers, on their keys.
    AngelSlim's second round for Kimi-Audio takes means of means. Arguments are those of
    `prune`, and the following.

    Args:
      clips: embeds `[B, N, D]` or `[N, D]`, tokens of audio.
      importance, attn, relevance, weight, rounding, least: as in `samp`.
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
    place = jnp.arange(clips.num_tokens, dtype=jnp.int32)
    start = jnp.where(clips.mask, place, clips.num_tokens), clips.mask
    if clips.pruned:
        return _round(clips, *start)

    def more(state: Groupings) -> jax.Array:
        left = jnp.sum(state[1], axis=-1)
        return jnp.any(left > jnp.maximum(clips.counts, 1))

    return jax.lax.while_loop(more, lambda state: _round(clips, *state), start)


def _round(clips: Clips, owner: jax.Array, leaders: jax.Array) -> Groupings:
    """Merges pairs of what `leaders` stand for."""
    n = clips.num_tokens
    now = first_of(leaders)  # their places, N after the last
    length = jnp.sum(leaders, axis=-1, dtype=jnp.int32)
    rows = merge(clips.embeds, clips.weights, owner)
    rows = jnp.take_along_axis(rows, now[..., None], axis=1, mode="fill", fill_value=0)
    cosine = adjacent_cosine(rows)
    first = jnp.arange(n - 1) % 2 == 0
    pairs = first & (jnp.arange(1, n) < length[:, None])
    if clips.pruned:
        pairs &= cosine > clips.threshold[:, None]
    excess = length - clips.counts
    merged = ranks(cosine, pairs, descending=True) < excess[:, None]
    merged = jnp.pad(merged & pairs, ((0, 0), (1, 0)))  # with the one before
    # The second of a pair, at its place, takes the owner of the first.
    before = jnp.pad(now[:, :-1], ((0, 0), (1, 0)))
    place = jnp.arange(n, dtype=jnp.int32)
    target = jnp.broadcast_to(place, now.shape)
    row = jnp.arange(len(now))[:, None]
    target = target.at[row, now].set(jnp.where(merged, before, now), mode="drop")
    owner = jnp.take_along_axis(target, owner, axis=1, mode="fill", fill_value=n)
    return owner, leaders & (target == place)
