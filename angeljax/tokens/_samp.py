"""Samp: similar neighbours become one token, the most telling of these stay."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from angeljax.tokens._grouping import Groups, group_adjacent
from angeljax.tokens._merging import Clips, Groupings, merging, ranks


@merging(weights="attention", pruner="dpp")
def samp(
    clips: Clips,
    *,
    self_similarity: bool = False,
    grouping: Literal["auto", "parallel", "scan"] = "auto",
) -> Groupings:
    """Similarity-attentive merging and pruning of audio tokens (Samp, SA-MAP).

    For a clip of L tokens h with a budget of T:

    1. Merging. Neighbours whose mean cosine with their group reaches the threshold join
       it (`group_adjacent`); with the attention W that a token receives, a group G
       becomes `sum(W_j h_j) / sum(W_j)` over j in G. That leaves M tokens, few for
       steady sounds and many for fast speech.
    2. Pruning, if M > T. With the relevance r of a group, the mean of its tokens'
       attention to themselves, and the cosines S of merged tokens, a determinantal
       point process with the kernel `r_i S_ij r_j` keeps T of them greedily.
    3. If M < T, the T - M tokens that fit their groups least leave them again and stand
       alone, so that T different tokens come out; the original for Qwen2-Audio repeats
       tokens here. This is what the one for Kimi-Audio does.

    All in the order of time. Source: AngelSlim's report (arXiv 2602.21233, 4.2.3); the
    DPP's greedy search is that of arXiv 1709.05135. Arguments are those of `prune`,
    and the following.

    Args:
      clips: embeds `[B, N, D]` or `[N, D]`, tokens of audio after the projector.
      importance: `[B, N]`, not negative: relevance r instead of attention's diagonal,
        and the weights of merging too if there is no attention.
      attn: attention of the encoder's last layer: `AttentionWeights`; a tuple of its
        two arrays; all weights `[B, heads, p N, p N]` of the p frames of each token; or
        what a token receives, `[B, N]`, for weights and relevance.
      threshold: mean cosine that joins a group, -1 to 1; a number, a traced scalar, or
        `[B]`.
      weights: "attention", or "uniform" for plain means, which needs no attention; the
        relevance is then the same for all tokens unless it is given.
      relevance: "mean" (Qwen2-Audio, GLM-ASR) or "max" (Kimi-Audio) over the heads, for
        `attn` with heads.
      pruner: "dpp", or "mmr" with r scaled to [0, 1], in `O(T N)` and not `O(T^2 N)`.
      weight: of r in "mmr".
      rounding: of a share: "round", halves to the even count, or "floor" (Kimi-Audio).
      least: tokens that a share keeps at least, if there are as many and K has room;
        the original keeps 2.
      self_similarity: count a token's cosine with itself, 1, in how it fits its group
        when tokens leave groups, as Kimi-Audio's original does.
      grouping: see `group_adjacent`.

    Returns:
      A `Selection` with `merged` rows; `indices` are the first tokens of their groups.
      Gradients flow through `merged` to the embeddings, not through choices.

    Raises:
      ValueError: no attention and none of its replacements, shapes that do not go
        together, or options with other values.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import samp
      >>> x = jnp.array([[1, 0], [1, 0.25], [0, 1], [-1, 0.5], [-1, 0.75]])
      >>> received, itself = jnp.array([3.0, 1, 1, 1, 1]), jnp.array([2.0, 2, 1, 3, 3])
      >>> chosen = samp(x, keep=2, attn=(received, itself))
      >>> chosen.indices.tolist(), chosen.merged.tolist()
      ([0, 3], [[1.0, 0.0625], [-1.0, 0.625]])
    """
    groups = group_adjacent(
        clips.embeds, threshold=clips.threshold, mask=clips.mask, form=grouping
    )
    released = _released(clips, groups, self_similarity)
    place = jnp.arange(clips.num_tokens, dtype=jnp.int32)
    return jnp.where(released, place, groups.first), groups.starts | released


def _released(clips: Clips, groups: Groups, self_similarity: bool) -> jax.Array:
    """bool `[R, N]`: tokens that leave their group because the budget has room."""
    joined = groups.mask & ~groups.starts
    scores = groups.scores
    if self_similarity:
        before = jnp.arange(clips.num_tokens) - groups.first
        scores = jnp.where(joined, (before * scores + 1) / (before + 1), jnp.inf)
    # Tokens that are alike, such as those of silence, fit equally well but for
    # rounding: of these the first leave.
    scores = jnp.round(scores * 2**18)
    room = clips.counts - groups.count
    return joined & (ranks(scores, joined, descending=False) < room[:, None])
