"""FlashPrefill against a transcription of its definition, block by block."""

from __future__ import annotations

import numpy as np
import pytest

from angeljax.attention import FlashPrefill, _estimate
from tests.attention._prompts import (
    DIM,
    HEADS,
    KV_HEADS,
    check,
    heaviest,
    prompt,
)

BLOCK = 16
OPTIONS = {
    "block_size": BLOCK,
    "sink_tokens": 16,
    "window_tokens": 32,
    "last_blocks": 1,
}


def _scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """`[H, n, n]`: energy of each block, not normalised by the row."""
    blocks = -(-len(q) // BLOCK)
    score = np.zeros((HEADS, blocks, blocks))
    for h in range(HEADS):
        mean = [
            k[j * BLOCK : (j + 1) * BLOCK, h // (HEADS // KV_HEADS)].mean(0)
            for j in range(blocks)
        ]
        for i in range(blocks):
            e = {
                (t, j): q[t, h] @ mean[j] / DIM**0.5
                for t in range(i * BLOCK, min((i + 1) * BLOCK, len(q)))
                for j in range(i + 1)
                if t >= (j + 1) * BLOCK - 1
            }
            for (_, j), x in e.items():
                score[h, i, j] += np.exp(x - max(e.values()))
    return score


def _mask(q, k, start, alpha, most):
    assert start == 0
    score = _scores(q, k)
    keep = np.zeros(score.shape, bool)
    blocks = score.shape[1]
    for h in range(HEADS):
        for i in range(blocks):
            row = score[h, i, : i + 1]
            j = np.arange(i + 1)
            forced = (j < 1) | (i - j < 2)
            kept = forced | (row >= alpha * score[h, i].max()) | (i == blocks - 1)
            kept &= heaviest(np.where(kept, row, -1), forced, most)
            keep[h, i, : i + 1] = kept
    return keep


def test_against_the_oracle_part_by_part(monkeypatch):
    # Four query blocks at a time, the last two of which overlap.
    monkeypatch.setattr(_estimate, "CHUNK_BYTES", 4 * 4 * 2 * HEADS * BLOCK * 6)
    selector = FlashPrefill(alpha=0.7, max_blocks=4, **OPTIONS)
    counts = check(selector, lambda *a: _mask(*a, alpha=0.7, most=4))
    # Row 4 reads what is forced, or the most there may be: one head would read 5.
    assert set(counts[0, :, 4]) == {3, 4}
    q, k, _ = (np.asarray(x[0]) for x in prompt())
    assert _mask(q, k, 0, alpha=0.7, most=9)[:, 4].sum(-1).max() == 5


def test_options():
    assert FlashPrefill(alpha=0.0).density(4096) == 1
    assert FlashPrefill().density(4096) is None
    for wrong in (
        {"alpha": 2.0}, {"sink_tokens": -1}, {"block_size": 0}, {"keep_ratio": 0.0},
        {"max_blocks": 2},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlashPrefill(**wrong)
