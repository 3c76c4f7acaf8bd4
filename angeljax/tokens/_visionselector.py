"""VisionSelector: the tokens that a learned scorer rates highest (arXiv 2510.16598)."""

from __future__ import annotations

import jax

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method


@method(needs="importance")
def visionselector(tokens: Tokens, *, randomize: bool = False) -> Choice:
    """The K tokens of the highest importance.

        S = topK(w),   w = score_tokens(scorer, embeds)

    Arguments are those of `prune`; `importance` is the score, of the learned scorer
    (`load_scorer`, `score_tokens`) or of anything else. DiffTopK, which the scorer is
    trained through, is monotone and changes no choice (arXiv 2510.16598).

    Args:
      tokens: see `prune`.
      randomize: draws K tokens without replacement from softmax(w); needs `key`.

    Returns:
      A `Selection`; its order is that of the scores.

    Raises:
      ValueError: without `importance`, or without `key` where it is needed.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((5, 4)), jnp.array([0.1, 3.0, 0.2, 2.0, 0.0])
      >>> visionselector(x, keep=2, importance=w).order.tolist()
      [1, 3]
    """
    scores = tokens.importance
    assert scores is not None
    if randomize:
        if tokens.key is None:
            raise ValueError("visionselector(randomize=True) needs key")
        # The top K of logits plus Gumbel noise are draws without replacement.
        scores = scores + jax.random.gumbel(tokens.key, scores.shape)
    return _choose.best(scores, tokens.mask, tokens.keep, tokens.count)
