"""SCOPE: salient tokens that cover the others (arXiv 2510.24214)."""

from __future__ import annotations

from angeljax.tokens._method import Choice, Tokens, method
from pallas_kernels import greedy_select


@method(needs="attention", batched=True)
def scope(
    tokens: Tokens,
    *,
    alpha: float = 1.0,
    precision: str = "highest",
    implementation: str | None = None,
) -> Choice:
    """Facility location times saliency.

        c_i  = max(0, max_{j in S} cos(x_i, x_j))
        next = argmax_j  a_j^alpha  sum_i max(0, cos(x_i, x_j) - c_i)

    where a is the attention that each token receives (arXiv 2510.24214).
    Arguments are those of `prune`.

    Args:
      tokens: see `prune`.
      alpha: power of the saliency, from 0 on; 0 is coverage alone.
      precision, implementation: of `pallas_kernels.greedy_select`.

    Returns:
      A `Selection`; every prefix of its order is the choice for a smaller K.

    Raises:
      ValueError: with neither `attn` nor `importance`, or `alpha` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]])
      >>> scope(x, keep=2, attn=jnp.array([0.3, 0.3, 0.3, 0.1])).order.tolist()
      [1, 2]
    """
    return greedy_select(
        tokens.embeds,
        tokens.saliency,
        tokens.keep,
        objective="facility",
        weight=alpha,
        mask=tokens.mask,
        counts=tokens.count,
        precision=precision,
        implementation=implementation,
    )
