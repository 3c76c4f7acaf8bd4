"""VecAttention against a transcription of its definition, key by key."""

from __future__ import annotations

import numpy as np
import pytest

from angeljax.attention import VecAttention
from tests.attention._prompts import (
    DIM,
    HEADS,
    KV_HEADS,
    check,
    heaviest,
)

BLOCK = 16
OPTIONS = {"block_size": BLOCK, "sink_tokens": 10, "window_tokens": 16}


def _mask(q, k, start, threshold=0.1, ratio=None):
    assert start == 0
    blocks = -(-len(q) // BLOCK)
    keep = np.zeros((HEADS, blocks, blocks), bool)
    for h in range(HEADS):
        for i in range(blocks):
            end = min((i + 1) * BLOCK, len(q))
            mean = q[i * BLOCK : end, h].mean(0)
            x = [mean @ k[t, h // (HEADS // KV_HEADS)] / DIM**0.5 for t in range(end)]
            row = keep[h, i]
            if ratio is not None:
                score = [max(x[j * BLOCK : (j + 1) * BLOCK]) for j in range(i + 1)]
                j = np.arange(i + 1)
                forced = (j < 1) | (i - j < 2)
                budget = int(ratio * (i + 1) + 0.5)
                row[: i + 1] = heaviest(np.asarray(score), forced, budget)
                continue
            for t in range(end):
                near = t >= i * BLOCK - 16
                if np.exp(x[t] - max(x)) >= threshold or t < 10 or near:
                    row[t // BLOCK] = True
    return keep


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"keep_ratio": 0.6}], ids=str)
def test_against_the_oracle(options):
    threshold, ratio = options.get("threshold", 0.1), options.get("keep_ratio")
    selector = VecAttention(**OPTIONS, **options)
    counts = check(
        selector, lambda *a: _mask(*a, threshold=threshold, ratio=ratio), sharp=0.5
    )
    assert (counts[0, :, 5] < 6).any()
    assert (selector.density(87) is None) == (ratio is None)


def test_options():
    assert VecAttention(threshold=0.0).density(999) == 1
    for wrong in ({"threshold": -1.0}, {"window_tokens": -1}, {"max_blocks": 9}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VecAttention(**wrong)
