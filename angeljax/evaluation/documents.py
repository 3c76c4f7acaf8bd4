"""Word and byte perplexity: figures that do not depend on the tokenizer.

As the LM Evaluation Harness measures wikitext: each document by itself, every token of
it predicted once, and the log-likelihood divided by a count of words or bytes of the
original text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from angeljax.evaluation.quality import EvalResult
from angeljax.evaluation.text import Windows


def document_windows(
    documents: Iterable[Sequence[int] | Int[np.ndarray, " _"]],
    length: int,
    prefix_id: int,
) -> Windows:
    """Cuts documents into windows that never span two of them.

    `prefix_id` stands before each document and predicts its first token. Windows do
    not overlap but for the token that predicts the next one. The last of a document is
    shifted to the left until it is full, so that its tokens have all the context there
    is; what an earlier window scored is not scored again. A model sees `length - 1`
    tokens at most: the harness with max_length 2048 has `length=2049` here.

    Args:
      documents: token ids of each one.
      length: tokens in a window, at least 2.
      prefix_id: id of the end-of-text or BOS token.

    Returns:
      Windows for `evaluate`, padded on the right with `prefix_id`.

    Raises:
      ValueError: `length` is too small, or there is no token to score.

    Example:
      >>> from angeljax.evaluation import document_windows
      >>> tokens, score_mask = document_windows([[5, 6, 7, 8], [9]], 4, prefix_id=0)
      >>> tokens.tolist()
      [[0, 5, 6, 7], [5, 6, 7, 8], [0, 9, 0, 0]]
      >>> score_mask.astype(int).tolist()
      [[0, 1, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, not {length}")
    rows, masks = [], []
    for document in documents:
        stream = np.concatenate([[prefix_id], np.asarray(document, np.int32)])
        scored = 1  # tokens up to here are done; the prefix never counts
        while scored < len(stream):
            end = min(scored - 1 + length, len(stream))
            start = max(end - length, 0)
            row = np.full(length, prefix_id, np.int32)
            row[: end - start] = stream[start:end]
            mask = np.zeros(length, bool)
            mask[scored - start : end - start] = True
            rows.append(row)
            masks.append(mask)
            scored = end
    if not rows:
        raise ValueError("the documents hold no token to score")
    return Windows(np.stack(rows), np.stack(masks))


def perplexity_per(result: EvalResult, count: int) -> float:
    """Perplexity per unit of the text instead of per token.

    Args:
      result: of `evaluate` over the whole text.
      count: words or bytes of the text as it was before tokenisation.

    Returns:
      exp(negative log-likelihood of the text / count).

    Raises:
      ValueError: `count` is not positive.

    Example:
      >>> from angeljax.evaluation import EvalResult, perplexity_per
      >>> result = EvalResult(perplexity=4.0, nll=math.log(4), nll_stderr=0, tokens=6)
      >>> round(perplexity_per(result, count=3), 6)  # two tokens a word
      16.0
    """
    if count < 1:
        raise ValueError(f"count must be positive, not {count}")
    try:
        return math.exp(result.nll * result.tokens / count)
    except OverflowError:  # a broken model
        return math.inf
