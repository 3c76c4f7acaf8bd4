"""DART: the tokens least like a few pivots (arXiv 2502.11494)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method, positive


@method(arrays={"keys": 1})
def dart(tokens: Tokens, *, image_pivots: int = 4, text_pivots: int = 4) -> Choice:
    """Pivots, and for each of them the tokens that duplicate it least.

    Pivots are the vision tokens, and the text tokens, whose keys have the largest L1
    norms. Vision pivots are kept. Each pivot p in turn then takes

        argmin_j cos(x_j, x_p),   ceil((K - vision pivots) / pivots) times,

    among tokens that nobody has taken, until there are K (arXiv 2502.11494, with the
    details of AngelSlim). The paper works after a layer of the language model; this
    form needs embeddings only. Arguments are those of `prune`: with `text` there are
    text pivots as well.

    Args:
      tokens: see `prune`.
      keys: `[B, N, C]`, keys of the vision tokens; default the embeddings.
      image_pivots: vision tokens that are pivots, at most K.
      text_pivots: text tokens that are pivots, if `text` is there.

    Returns:
      A `Selection`; its order is that of the pivots and what each of them took.

    Raises:
      ValueError: a number of pivots is negative, or there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[9.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]])
      >>> dart(x, keep=3, image_pivots=1).order.tolist()
      [0, 2, 3]
    """
    positive("image_pivots", image_pivots, 0)
    positive("text_pivots", text_pivots, 0)
    if not image_pivots and (tokens.text is None or not text_pivots):
        raise ValueError("dart needs a pivot: image_pivots, or text and text_pivots")
    n, keep, count = tokens.num_tokens, tokens.keep, tokens.count
    keys = tokens.arrays.get("keys", tokens.embeds)
    size = jnp.sum(jnp.abs(keys), axis=-1)
    images = jnp.minimum(image_pivots, count)
    most = min(image_pivots, keep)
    first = _choose.best(size, tokens.mask, most, images)
    there, pivots = first < n, tokens.embeds[jnp.minimum(first, n - 1)]
    if tokens.text is not None:
        size = jnp.sum(jnp.abs(tokens.text), axis=-1)
        where = jnp.argsort(-size, stable=True)[:text_pivots]
        there = jnp.concatenate([there, size[where] > 0])
        pivots = jnp.concatenate([pivots, tokens.text[where]])
    share = -(-(count - images) // jnp.maximum(jnp.sum(there), 1))
    like = _choose.cosines(pivots, tokens.embeds)

    def take(state: Any, pivot: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        order, done, taken = state
        like, there = pivot
        more = jnp.where(there, jnp.minimum(share, count - done), 0)
        new = _choose.best(-like, tokens.mask & ~taken, keep, more)
        slots = jnp.where(new < n, done + jnp.arange(keep), keep)
        order = order.at[slots].set(new, mode="drop")
        return (order, done + more, taken | _choose.chosen(new, n)), None

    order = jnp.full(keep, n, jnp.int32).at[:most].set(first)
    state = order, jnp.sum(order < n), _choose.chosen(first, n)
    return jax.lax.scan(take, state, (like, there))[0][0]
