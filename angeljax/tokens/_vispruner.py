"""VisPruner: important tokens, and others that are not alike (arXiv 2412.01818)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method, within


@method(needs="attention")
def vispruner(tokens: Tokens, *, important_ratio: float = 0.5) -> Choice:
    """Half of the tokens by attention, the others by dropping duplicates.

    The round(K important_ratio) tokens with the most attention stay (one place at least
    is left for others). From the rest, until K are left: tokens at even places of what
    remains are compared with those at odd places, and of the even ones the

        r = min(8, rest // 2, rest - wanted)

    with the highest max_j cos(x_i, x_j) go (arXiv 2412.01818). Arguments
    are those of `prune`.

    Args:
      tokens: see `prune`.
      important_ratio: share of K for important tokens, from 0 to 1.

    Returns:
      A `Selection`; its order is the important tokens, then the others by place.

    Raises:
      ValueError: with neither `attn` nor `importance`, or an option out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
      >>> a = jnp.array([0.0, 0.0, 0.0, 1.0])
      >>> vispruner(x, keep=2, attn=a).order.tolist()  # 3 is important, 2 unlike
      [3, 2]
    """
    within("important_ratio", important_ratio, 0, 1)
    n, keep, count, mask = tokens.num_tokens, tokens.keep, tokens.count, tokens.mask
    table = [round(k * important_ratio) for k in range(keep + 1)]
    table = [k - 1 if k > 1 and a >= k else a for k, a in enumerate(table)]
    number = jnp.asarray(np.array(table, np.int32))[count]
    important = _choose.best(tokens.saliency, mask, keep, number)
    rest = mask & ~_choose.chosen(important, n)
    like = _choose.cosines(tokens.embeds, tokens.embeds)
    wanted = count - number

    def more(rest: jax.Array) -> jax.Array:
        return jnp.sum(rest) > wanted

    def drop(rest: jax.Array) -> Any:
        place, left = _choose.rank(rest), jnp.sum(rest, dtype=jnp.int32)
        even, odd = rest & (place % 2 == 0), rest & (place % 2 == 1)
        nearest = jnp.max(like, axis=1, where=odd, initial=-jnp.inf)
        # A single token left over has nothing to be compared with.
        number = jnp.minimum(jnp.minimum(8, jnp.maximum(left // 2, 1)), left - wanted)
        return rest & ~_choose.chosen(_choose.best(nearest, even, min(8, n), number), n)

    rest = jax.lax.while_loop(more, drop, rest)
    others = jnp.argsort(~rest, stable=True)[:keep]
    slot = jnp.arange(keep)
    other = others[jnp.maximum(slot - number, 0)]
    return _choose.first(jnp.where(slot < number, important, other), count, n)
