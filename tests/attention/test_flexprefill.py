"""FlexPrefill against a transcription of its algorithms, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest

from angeljax.attention import FlexPrefill
from tests.attention._prompts import (
    DIM,
    HEADS,
    KV_HEADS,
    check,
    chunks,
    heaviest,
    prompt,
    softmax,
)

BLOCK = 16


def _covered(mass, bound):
    """Entries, best first, while what they hold stays within the bound."""
    taken, held = [], 0.0
    for x in np.argsort(-mass, kind="stable"):
        held += mass[x]
        if held > bound:
            break
        taken.append(x)
    return taken


def _head(q, k, start, gamma, tau, least, ratio):
    """bool `[n_q, n_k]` of one head, and whether it is query-aware."""
    end = start + len(q)
    n_q, n_k = -(-len(q) // BLOCK), -(-end // BLOCK)
    last = min(BLOCK, len(q))
    column, slash = np.zeros(end), np.zeros(end)
    for row in range(len(q) - last, len(q)):
        p = softmax(q[row] @ k[: start + row + 1].T / DIM**0.5) / last
        for key, weight in enumerate(p):
            column[key] += weight
            slash[start + row - key] += weight
    pooled = [np.add.reduceat(x, np.arange(0, end, BLOCK)) for x in (column, slash)]
    means = [k[j * BLOCK : min((j + 1) * BLOCK, end)].mean(0) for j in range(n_k)]
    guess = softmax(q[len(q) - last :].mean(0) @ np.transpose(means) / DIM**0.5)
    middle = (guess + pooled[0]) / 2
    js = sum((x * np.log(x / middle)).sum() for x in (guess, pooled[0])) / 2
    aware = js**0.5 < tau

    chosen = []
    for tokens, blocks in zip((column, slash), pooled, strict=True):
        count = (len(_covered(tokens, gamma)) + 1) // BLOCK + 1
        budget = least if aware else max(count, least)
        order = [0, *[j for j in np.argsort(-blocks, kind="stable") if j]]
        chosen.append(set(order[:budget]))
    scores = np.full((n_q, n_k), -1.0)
    keep = np.zeros((n_q, n_k), bool)
    for i in range(n_q):
        own = start // BLOCK + i
        mean = q[i * BLOCK : (i + 1) * BLOCK].mean(0)
        row = softmax(mean @ np.transpose(means[: own + 1]) / DIM**0.5)
        for j in range(own + 1):
            keep[i, j] = j in chosen[0] or own - j in chosen[1]
            scores[i, j] = row[j] if aware else pooled[0][j] + pooled[1][own - j]
    if aware:
        flat = np.maximum(scores, 0).ravel()
        for entry in _covered(flat, gamma * n_q):
            keep[divmod(entry, n_k)] |= flat[entry] > 0
    if ratio is not None:
        for i in range(n_q):
            own = start // BLOCK + i
            forced = np.isin(np.arange(own + 1), (0, own))
            budget = int(ratio * (own + 1) + 0.5)
            keep[i] = False
            keep[i, : own + 1] = heaviest(scores[i, : own + 1], forced, budget)
    return keep, aware


def _oracle(gamma=0.5, tau=0.0, least=1, ratio=None, seen=None):
    def mask(q, k, start):
        heads = [
            _head(
                q[:, h], k[:, h // (HEADS // KV_HEADS)], start, gamma, tau, least, ratio
            )
            for h in range(HEADS)
        ]
        if seen is not None:
            seen.extend(aware for _, aware in heads)
        return np.stack([keep for keep, _ in heads])

    return mask


def test_shares_of_a_padded_batch_against_the_oracle():
    seen: list[bool] = []
    selector = FlexPrefill(gamma=0.4, tau=0.2, block_size=BLOCK, keep_ratio=0.5)
    check(selector, _oracle(0.4, 0.2, ratio=0.5, seen=seen), sharp=0.6)
    assert any(seen) and not all(seen)  # heads of both kinds


def test_a_chunk_is_selected_by_its_own_queries():
    seen: list[bool] = []
    q, k, v = prompt(3, rows=96, batch=1)
    selector = FlexPrefill(gamma=0.8, tau=0.1113, block_size=BLOCK, min_budget=20)
    mask = chunks(selector, q, k, v, 48, 96)
    for start in (0, 48):
        part = mask[0, :, start // BLOCK : start // BLOCK + 3, : start // BLOCK + 3]
        expected = _oracle(0.8, 0.1113, least=2, seen=seen)(
            np.asarray(q[0, start : start + 48]), np.asarray(k[0]), start
        )
        np.testing.assert_array_equal(part, expected)
    assert any(seen) and not all(seen)
    assert len(set(mask.sum((0, 2, 3)))) > 2


def test_options():
    for wrong in (
        {"gamma": 1.5}, {"tau": -1.0}, {"min_budget": 0}, {"max_budget": 1.5},
        {"max_budget": 3, "min_budget": 5}, {"max_blocks": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlexPrefill(**wrong)
