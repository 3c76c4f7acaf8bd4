"""`fastadasp`: the most similar neighbours of the clip become one token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

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


def fastadasp(
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
    """Merges neighbours with the most similar embeddings, chains of them together.

    Of the L - 1 links between neighbours the L - T with the highest cosine are closed;
    tokens that closed links join become their mean. Exactly T tokens come out, in the
    order of time.

    With a pruner only links above the threshold are closed, L - T at most, and the
    pruner keeps T of what comes out, as `samp` does.

    Source: the merging step of FastAdaSP (arXiv 2410.03007) as AngelSlim applies it,
    once and before the language model. The paper merges inside of the language model's
    layers, on their keys, and chooses the layers.

    Args:
      embeds: `[B, N, D]` or `[N, D]`, tokens of audio.
      keep: T as a count, or as a share of the real tokens of each row.
      importance, mask, attn, relevance, weight, rounding, least: as in `samp`.
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
    return _fastadasp(embeds, importance, mask, attn, threshold, options)


# Outside of a `jit`, one program instead of many small ones.
@functools.partial(jax.jit, static_argnames="options")
def _fastadasp(
    embeds: jax.Array,
    importance: jax.Array | None,
    mask: jax.Array | None,
    attn: Attention | None,
    threshold: float | jax.Array,
    options: Options,
) -> Selection:
    clips = Clips.of(embeds, mask, options)
    heavy, relevant = _merging.token_weights(clips, attn, importance, options)
    cosine = adjacent_cosine(jax.lax.stop_gradient(clips.embeds))
    links = clips.mask[:, 1:]
    excess = clips.length - clips.counts
    if options.pruner is not None:
        links &= cosine > threshold
    closed = _merging.ranks(cosine, links, descending=True) < excess[:, None]
    closed = jnp.pad(closed & links, ((0, 0), (1, 0)))  # with the token before
    leaders = clips.mask & ~closed
    place = jnp.arange(leaders.shape[1], dtype=jnp.int32)
    owner = jax.lax.cummax(jnp.where(leaders, place, 0), axis=1)
    owner = jnp.where(clips.mask, owner, leaders.shape[1])
    rows = _merging.merge(clips.embeds, heavy, owner)
    if options.pruner is None:
        order = _merging.first_of(leaders, clips.num_keep)
    else:
        relevant = _merging.mean_of(relevant, owner)
        order = _merging.choose(clips, rows, relevant, leaders, options)
    return clips.selection(order, rows)
