"""DivPrune: the tokens that lie farthest apart (arXiv 2503.02175)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method
from pallas_kernels import greedy_select


@method(batched=True)
def divprune(
    tokens: Tokens, *, center: bool = False, implementation: str | None = None
) -> Choice:
    """Farthest-point sampling, from the token farthest from all others.

        first: argmax_i min_j (1 - cos(x_i, x_j))
        then:  argmax_i min_{j in S} (1 - cos(x_i, x_j))

    the greedy answer to the max-min diversity problem (arXiv 2503.02175). Arguments
    are those of `prune`.

    Args:
      tokens: see `prune`.
      center: compares embeddings less their mean, as Cen-Prune does.
      implementation: of `pallas_kernels.greedy_select`.

    Returns:
      A `Selection`; every prefix of its order is the choice for a smaller K.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2], [-1.0, -0.3]])
      >>> divprune(x, keep=2).order.tolist()
      [3, 2]
    """
    embeds = tokens.embeds
    if center:
        embeds = embeds - _choose.masked_mean(embeds, tokens.mask)[..., None, :]
    like = _choose.cosines(embeds, embeds)
    return greedy_select(
        None,
        _seed(like, tokens.mask),
        tokens.keep,
        weight=0.0,
        gram=like,
        mask=tokens.mask,
        counts=tokens.count,
        implementation=implementation,
    )


def _seed(like: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 `[B, N]`: how far the nearest other token is."""
    other = mask[:, None] & ~jnp.eye(mask.shape[-1], dtype=bool)
    return 1 - jnp.max(like, axis=-1, where=other, initial=-2.0)
