"""Windows over documents, and perplexity per word."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.evaluation import document_windows, evaluate, perplexity_per


def bigram(table, tokens):
    return table[tokens]


def test_every_token_is_scored_once_with_its_own_past(rng):
    documents = [rng.integers(1, 40, n) for n in (1, 5, 0, 6, 13)]
    tokens, mask = document_windows(documents, 6, prefix_id=0)
    assert mask.sum() == 25 and not mask[:, 0].any()
    # From the start of a document or over a whole window: never past its end.
    scored = [(int(t), int(m)) for row in zip(tokens, mask, strict=True)
              for t, m in zip(*row, strict=True)]  # fmt: skip
    assert [t for t, m in scored if m] == np.concatenate(documents).tolist()
    starts = tokens[:, 0] == 0
    assert starts.tolist() == [True, True, True, False, True, False, False]


def test_per_word(rng):
    table = rng.normal(size=(40, 40)).astype(np.float32)
    documents = [rng.integers(1, 40, n) for n in (7, 30)]
    log_probs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    total = sum(
        log_probs[a, b] for d in documents for a, b in zip([0, *d[:-1]], d, strict=True)
    )
    result = evaluate(bigram, jnp.asarray(table), document_windows(documents, 8, 0))
    assert result.tokens == 37
    assert perplexity_per(result, 10) == pytest.approx(math.exp(-total / 10), rel=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="length must be at least 2, not 1"):
        document_windows([[1]], 1, 0)
    with pytest.raises(ValueError, match="no token to score"):
        document_windows([[]], 4, 0)
