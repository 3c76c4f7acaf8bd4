"""FastV: the tokens that the last token of the prompt looks at (arXiv 2403.06764)."""

from __future__ import annotations

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method


@method(needs="attention")
def fastv(tokens: Tokens) -> Choice:
    """The K tokens with the most attention.

        S = topK_j( mean_h softmax_j(q_h . k_hj / sqrt(d)) )

    where q is the last text token in an early layer of the language model, and j runs
    over the vision tokens only (arXiv 2403.06764, which ranks after layer 2;
    AngelSlim after layer 0). Arguments are those of `prune`; `attn` is that attention,
    and `last_token_attention` computes it from queries and keys.

    Args:
      tokens: see `prune`.

    Returns:
      A `Selection`; its order is that of the attention.

    Raises:
      ValueError: with neither `attn` nor `importance`.

    Example:
      >>> import jax.numpy as jnp
      >>> attn = jnp.array([[0.1, 0.6, 0.0, 0.3], [0.2, 0.0, 0.1, 0.7]])  # two heads
      >>> fastv(jnp.ones((4, 8)), keep=2, attn=attn).order.tolist()
      [3, 1]
    """
    return _choose.best(tokens.saliency, tokens.mask, tokens.keep, tokens.count)
