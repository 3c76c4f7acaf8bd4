"""PruMerge and PruMerge+: outliers of the attention, merged (arXiv 2403.15388)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose
from angeljax.tokens._baselines import strided
from angeljax.tokens._method import Choice, Tokens, method, positive, within


@method(needs="attention", arrays={"keys": 1})
def prumerge(
    tokens: Tokens,
    *,
    adaptive: bool = False,
    neighbours: int = 32,
    uniform_ratio: float = 0.0,
) -> Choice:
    """Tokens with the most attention, each with its neighbours added.

        x'_i = x_i + sum over the `neighbours` j with the most similar keys of a_j x_j

    where a is the attention from the class token (arXiv 2403.15388, with the details of
    its code; neighbours may be kept tokens themselves). That code appends one more row,
    the attention-weighted sum of all that is dropped, which stands at no token's place
    and is left out here. Arguments are those of `prune`; `attn` should be weights, as
    `cls_attention` gives: scores that add up to more than 1, such as those of
    `received_attention`, are divided by their sum, which else would drown the token.

    Args:
      tokens: see `prune`.
      keys: `[B, N, C]`, keys of the vision tower; default the embeddings.
      adaptive: keeps as many as the attention has outliers, a > Q3 + 1.5 (Q3 - Q1), at
        least one and at most K, so that rows keep different numbers.
      neighbours: how many are added; 0 only selects.
      uniform_ratio: share of the kept tokens that is not chosen by attention but spread
        evenly over the rest; `prumerge_plus` has 0.75.

    Returns:
      A `Selection`, with `merged` unless `neighbours` is 0. Its order is that of the
      attention, then of the place.

    Raises:
      ValueError: with neither `attn` nor `importance`, or an option out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
      >>> a = jnp.array([0.6, 0.3, 0.1])
      >>> prumerge(x, keep=1, attn=a, neighbours=1).merged.tolist()
      [[1.600000023841858, 0.0]]
    """
    positive("neighbours", neighbours, 0)
    within("uniform_ratio", uniform_ratio, 0, 1)
    n, keep, count, mask = tokens.num_tokens, tokens.keep, tokens.count, tokens.mask
    attn = tokens.saliency
    table = np.array(
        [round(k * (1 - uniform_ratio)) for k in range(keep + 1)], np.int32
    )
    if adaptive:
        # The spread tokens come in proportion to the outliers, as the stride does.
        total = jnp.round(_outliers(attn, mask) / max(1 - uniform_ratio, 1e-6))
        count = jnp.minimum(count, jnp.maximum(total, 1).astype(jnp.int32))
    number = jnp.asarray(table)[count]
    heavy = _choose.best(attn, mask, keep, number)
    spread = strided(mask & ~_choose.chosen(heavy, n), keep, count - number)
    slot = jnp.arange(keep)
    order = jnp.where(slot < number, heavy, spread[jnp.maximum(slot - number, 0)])
    order = _choose.first(order, count, n)
    if not neighbours:
        return order
    keys = tokens.arrays.get("keys", tokens.embeds)
    kept = jnp.minimum(order, n - 1)
    like = _choose.cosines(keys[kept], keys)
    like = jnp.where(mask & (jnp.arange(n) != kept[:, None]), like, -jnp.inf)
    value, near = jax.lax.top_k(like, min(neighbours, n))
    total = jnp.sum(jnp.where(mask, attn, 0))
    weight = jnp.where(value > -jnp.inf, attn[near] / jnp.maximum(total, 1.0), 0)
    added = jnp.einsum("kj,kjd->kd", weight, tokens.rows[near])
    return order, tokens.rows.at[order].add(added, mode="drop")


@method(needs="attention", arrays={"keys": 1})
def prumerge_plus(
    tokens: Tokens,
    *,
    adaptive: bool = False,
    neighbours: int = 32,
    uniform_ratio: float = 0.75,
) -> Choice:
    """`prumerge` with three evenly spread tokens for each one chosen by attention.

    PruMerge+ of arXiv 2403.15388: attention alone leaves parts of the
    image without any token.

    Args:
      tokens: see `prune`.
      keys, adaptive, neighbours, uniform_ratio: see `prumerge`.

    Returns:
      See `prumerge`.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.1])
      >>> prumerge_plus(jnp.ones((7, 2)), keep=4, attn=a, neighbours=0).order.tolist()
      [3, 0, 2, 5]
    """
    choose = prumerge.__wrapped__  # type: ignore[attr-defined]
    return choose(
        tokens,
        adaptive=adaptive,
        neighbours=neighbours,
        uniform_ratio=uniform_ratio,
    )


def _outliers(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 scalar: scores above the third quartile by 1.5 interquartile ranges."""
    q1, q3 = jnp.nanpercentile(jnp.where(mask, scores, jnp.nan), jnp.array([25, 75]))
    return jnp.sum(mask & (scores > q3 + 1.5 * (q3 - q1)), dtype=jnp.float32)
