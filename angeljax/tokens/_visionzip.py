"""VisionZip: dominant tokens, and a few that stand for the rest (arXiv 2412.04467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method, one_of, within


@method(needs="attention", arrays={"keys": 1})
def visionzip(
    tokens: Tokens, *, contextual_ratio: float = 10 / 64, merge: str | None = "mean"
) -> Choice:
    """Dominant tokens by attention; each other token joins a contextual one.

    Of K tokens, t = max(1, round(K contextual_ratio)) are contextual: every
    floor(rest / t)-th of those that are not among the K - t with the most attention.
    Each token that is neither joins the contextual token with the most similar key,

        argmax_t cos(k_i, k_t),

    and the row of a contextual token becomes the mean of itself and what joined it
    (arXiv 2412.04467, with the details of AngelSlim). Arguments are those of `prune`.

    Args:
      tokens: see `prune`.
      keys: `[B, N, C]`, keys of the vision tower (mean over heads); default the
        embeddings.
      contextual_ratio: share of K, from 0 to 1.
      merge: "mean" of all, as AngelSlim does; "add", the contextual token plus the mean
        of those that joined, as the first implementation does; None only selects.

    Returns:
      A `Selection`, with `merged` unless `merge` is None. Its order is dominant tokens
      by attention, then contextual ones by place.

    Raises:
      ValueError: with neither `attn` nor `importance`, or an option out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
      >>> chosen = visionzip(x, keep=2, attn=jnp.array([1.0, 0.2, 0.1, 0.0]))
      >>> chosen.order.tolist(), chosen.merged.tolist()
      ([0, 1], [[9.0, 9.0], [3.0, 0.0]])
    """
    within("contextual_ratio", contextual_ratio, 0, 1)
    one_of("merge", merge, ("mean", "add", None))
    n, keep, count, mask = tokens.num_tokens, tokens.keep, tokens.count, tokens.mask
    table = [max(1, round(k * contextual_ratio)) for k in range(keep + 1)]
    contextual = jnp.minimum(jnp.asarray(np.array(table, np.int32))[count], count)
    dominant = _choose.best(tokens.saliency, mask, keep, count - contextual)
    rest = mask & ~_choose.chosen(dominant, n)
    step = jnp.maximum(jnp.sum(rest) // jnp.maximum(contextual, 1), 1)
    place = _choose.rank(rest)
    target = rest & (place % step == 0) & (place // step < contextual)
    slot = jnp.arange(keep)
    later = jnp.argsort(~target, stable=True)[jnp.maximum(slot - count + contextual, 0)]
    order = _choose.first(
        jnp.where(slot < count - contextual, dominant, later), count, n
    )
    if merge is None:
        return order
    keys = tokens.arrays.get("keys", tokens.embeds)
    like = jnp.where(target, _choose.cosines(keys, keys), -jnp.inf)
    joins = jnp.where(rest & ~target, jnp.argmax(like, axis=-1), n)

    def gather(rows: jax.Array) -> jax.Array:
        return jnp.zeros_like(rows).at[joins].add(rows, mode="drop")

    members, joined = gather(jnp.ones((n, 1))), gather(tokens.rows)
    if merge == "mean":
        return order, (tokens.rows + joined) / (1 + members)
    return order, tokens.rows + joined / jnp.maximum(members, 1)
