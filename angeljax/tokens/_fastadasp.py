"""FastAdaSP: the most similar neighbours of a clip become one token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.tokens._grouping import adjacent_cosine
from angeljax.tokens._merging import Clips, Groupings, merging, ranks


@merging(weights="uniform", pruner=None)
def fastadasp(clips: Clips) -> Groupings:
    """Merges neighbours with the most similar embeddings, chains of them together.

    Of the L - 1 links between neighbours the L - T with the highest cosine are closed;
    tokens that closed links join become their mean. Exactly T tokens come out, in the
    order of time.

    With a pruner only links above the threshold are closed, L - T at most, and the
    pruner keeps T of what comes out, as `samp` does.

    Source: the merging step of FastAdaSP (arXiv 2410.03007) as AngelSlim applies it,
    once and before the language model. The paper merges inside of the language model's
    layers, on their keys, and chooses the layers. Arguments are those of `prune`, and
    the following.

    Args:
      clips: embeds `[B, N, D]` or `[N, D]`, tokens of audio.
      importance, attn, relevance, weight, rounding, least: as in `samp`.
      weights: "uniform", or "attention" for means by the attention that tokens receive.
      pruner: None, "dpp" or "mmr". Without attention and importance all tokens are
        equally relevant to it.
      threshold: a cosine, with a pruner only.

    Returns:
      A `Selection` with `merged` rows; `indices` are the first tokens of their chains.

    Raises:
      ValueError: as `samp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import fastadasp
      >>> x = jnp.array([[1, 0], [1, 0.25], [1, 0.5], [0, 1], [-1, 0.5]])
      >>> chosen = fastadasp(x, keep=3)
      >>> chosen.indices.tolist(), chosen.merged[0].tolist()
      ([0, 3, 4], [1.0, 0.25])
    """
    cosine, links = adjacent_cosine(clips.embeds), clips.mask[:, 1:]
    if clips.pruned:
        links &= cosine > clips.threshold[:, None]
    excess = clips.length - clips.counts
    closed = ranks(cosine, links, descending=True) < excess[:, None]
    closed = jnp.pad(closed & links, ((0, 0), (1, 0)))  # with the token before
    leaders = clips.mask & ~closed
    place = jnp.arange(clips.num_tokens, dtype=jnp.int32)
    owner = jax.lax.cummax(jnp.where(leaders, place, 0), axis=1)
    return jnp.where(clips.mask, owner, clips.num_tokens), leaders
