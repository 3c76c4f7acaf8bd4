"""Rows of tokens of many kinds."""

from __future__ import annotations

import numpy as np

KINDS = "random", "clustered", "duplicated", "constant", "signs"


def row(
    rng: np.random.Generator, kind: str, n: int, d: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `[n, d]` and importance `[n]`.

    Those of "duplicated", "constant" and "signs" are of 1 and -1 with d a square, so
    that every cosine is exact in float32 and ties are ties for everybody.
    """
    x = rng.normal(size=(n, d))
    w = rng.normal(size=n)
    if kind == "clustered":
        centres = rng.normal(size=(max(n // 6, 1), d))
        x = centres[rng.integers(len(centres), size=n)] + 0.2 * x + 0.5
    elif kind != "random":
        x = np.where(x > 0, 1.0, -1.0)
        w = rng.integers(0, 17, size=n) / 16
        if kind == "duplicated":
            x = x[rng.integers(max(n // 3, 1), size=n)]
        if kind == "constant":
            w = np.full(n, 0.5)
    return x.astype(np.float32), w.astype(np.float32)


def attention(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights that sum to 1 along the last axis, a few of them large."""
    logits = 2 * rng.normal(size=shape)
    weights = np.exp(logits)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
