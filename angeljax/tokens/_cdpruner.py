"""CDPruner: diversity given the question, by a DPP (arXiv 2506.10967)."""

from __future__ import annotations

import jax.numpy as jnp

from angeljax.tokens._method import Choice, Tokens, method
from angeljax.tokens._proxies import text_relevance
from pallas_kernels import greedy_select


@method(needs="text", batched=True)
def cdpruner(
    tokens: Tokens, *, precision: str = "highest", implementation: str | None = None
) -> Choice:
    """Greedy MAP of a determinantal point process, conditioned on relevance.

        L = diag(r) S diag(r),   S_ij = cos(x_i, x_j),   next = argmax_i log det L_{S+i}
        r = (q - min q + 1e-6) / (max q - min q + 1e-6)

    (arXiv 2506.10967, with the details of its code). q is `importance`, or else
    `text_relevance` of the embeddings and `text`. That code takes q from CLIP's
    embeddings of image and text, `text_relevance(clip_image, clip_text)`, and not from
    those that it compares; pass that as `importance`. Arguments are those of `prune`.

    Args:
      tokens: see `prune`.
      precision, implementation: of `pallas_kernels.greedy_select`.

    Returns:
      A `Selection`; every prefix of its order is the choice for a smaller K. Tokens
      that depend linearly on the chosen ones come last, by their relevance.

    Raises:
      ValueError: with neither `text` nor `importance`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]])
      >>> q = jnp.array([1.0, 0.9, 0.5, 0.0])
      >>> cdpruner(x, keep=2, importance=q).order.tolist()
      [0, 2]
    """
    relevance = tokens.importance
    if relevance is None:
        assert tokens.text is not None
        relevance = text_relevance(tokens.embeds, tokens.text)
    low = jnp.min(relevance, axis=-1, where=tokens.mask, initial=jnp.inf, keepdims=True)
    high = jnp.max(relevance, -1, where=tokens.mask, initial=-jnp.inf, keepdims=True)
    relevance = (relevance - low + 1e-6) / (high - low + 1e-6)
    return greedy_select(
        tokens.embeds,
        jnp.where(tokens.mask, relevance, 0),
        tokens.keep,
        objective="dpp",
        mask=tokens.mask,
        counts=tokens.count,
        precision=precision,
        implementation=implementation,
    )
