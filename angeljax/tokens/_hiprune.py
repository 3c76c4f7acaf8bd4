"""HiPrune: objects in the middle layers, context in the last (arXiv 2508.00553)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method, positive, within


@method(needs="attention", arrays={"object_attn": 0, "positions": 1})
def hiprune(tokens: Tokens, *, alpha: float = 0.1, width: int | None = None) -> Choice:
    """Anchors with their neighbours, then the tokens that the last layer looks at.

        anchors    = topA(object_attn),  A = round(alpha K / 5), at least 1 from K = 5
        buffers    = the anchors' four neighbours in the image
        registers  = topK(attn) of the rest, until there are K

    (arXiv 2508.00553). Attention is what each token receives
    (`received_attention`): `attn` in the last layer, `object_attn` in one in the
    middle. Arguments are those of `prune`.

    AngelSlim takes the places i - 1 and i + 1 for neighbours at the border as well,
    which lie on the other side of the image; here such neighbours are not there. Nor
    are more than K tokens ever kept.

    Args:
      tokens: see `prune`.
      object_attn: `[B, N]`, of the middle layer; default `attn`.
      alpha: share of the tokens for anchors and neighbours, from 0 to 1.
      positions: `[B, N, 2]`, row and column of each token, where images differ in size
        or have holes. With `groups`, each of them is an image.
      width: tokens of a row of the image, in place of `positions`; default
        floor(sqrt(N)).

    Returns:
      A `Selection`; its order is anchors, buffers, registers.

    Raises:
      ValueError: with neither `attn` nor `importance`, or an option out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.zeros(16).at[5].set(1.0).at[15].set(0.5)
      >>> hiprune(jnp.ones((16, 4)), keep=6, attn=a, alpha=0.8).order.tolist()
      [5, 1, 4, 6, 9, 15]
    """
    within("alpha", alpha, 0, 1)
    if width is not None:
        positive("width", width)
    n, keep, count, mask = tokens.num_tokens, tokens.keep, tokens.count, tokens.mask
    width = width or max(math.isqrt(n), 1)
    deep = tokens.saliency
    middle = tokens.arrays.get("object_attn", deep)
    table = [round(k * alpha / 5) for k in range(keep + 1)]
    table = [max(a, 1) if alpha and k >= 5 else a for k, a in enumerate(table)]
    anchors = _choose.best(middle, mask, keep, jnp.asarray(np.array(table))[count])
    anchor = _choose.chosen(anchors, n)

    place = jnp.stack([jnp.arange(n) // width, jnp.arange(n) % width], axis=-1)
    place = tokens.arrays.get("positions", place)
    aside = jnp.sum(jnp.abs(place[:, None] - place), axis=-1) == 1
    buffer = jnp.any(aside & anchor[:, None], axis=0) & ~anchor & mask
    # The three kinds one after the other, each in its own order.
    kind = jnp.where(anchor, 0, jnp.where(buffer, 1, jnp.where(mask, 2, 3)))
    score = jnp.where(anchor, -middle, jnp.where(buffer, 0.0, -deep))
    order = jnp.lexsort((score, kind))[:keep]
    return _choose.first(order, count, n)
