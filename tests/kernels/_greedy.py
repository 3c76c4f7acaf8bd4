"""A literal greedy selection in numpy, float64 where sums are long, and its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np


def cosine(x: Any) -> Any:
    """Signed cosines `[N, N]` in float64."""
    x = np.asarray(x, np.float64)
    unit = np.zeros_like(x)
    for i, row in enumerate(x):
        norm = np.sqrt(np.sum(row * row))
        if norm > 0 and np.isfinite(norm):
            unit[i] = row / (norm + 1e-8)
    return unit @ unit.T


def choices(
    gram: Any,
    importance: Any,
    num_select: int,
    *,
    objective: str = "mmr",
    weight: float = 0.5,
    mask: Any = None,
    count: int | None = None,
    parallel: int = 1,
) -> list[int]:
    """One row: float32 scores for "mmr" as everywhere, float64 for the others."""
    gram = np.asarray(gram)
    n = len(gram)
    free = [True] * n if mask is None else [bool(x) for x in mask]
    valid = list(free)
    v = np.zeros(n, np.float32) if importance is None else np.asarray(importance)
    v = np.where(np.isnan(v), np.finfo(np.float32).min, v).astype(np.float32)
    if objective != "mmr":
        v = np.maximum(v, 0)
    most = num_select if count is None else min(count, num_select)
    most = min(most, sum(free))
    order: list[int] = []
    while len(order) < most:
        score = []
        for i in range(n):
            score.append((-np.inf, -np.inf) if not free[i] else (0.0, 0.0))
            if not free[i]:
                continue
            if objective == "mmr":
                score[i] = (_mmr(gram, v, weight, order, i), 0.0)
            elif objective == "dpp":
                score[i] = _dpp(gram, v, order, i)
            else:
                gain = _gain(gram, valid, order, i) * float(v[i]) ** weight
                score[i] = (1.0, gain) if gain > 0 else (0.0, float(v[i]))
        # Stable: the lowest index of equal scores.
        ranked = sorted(range(n), key=lambda i: tuple(-x for x in score[i]))
        for best in ranked[:parallel]:
            if len(order) < most and free[best]:
                order.append(best)
                free[best] = False
    return order + [n] * (num_select - len(order))


def _mmr(gram: Any, v: Any, weight: float, order: list[int], i: int) -> float:
    if not order:
        return float(v[i])
    near = max(np.float32(gram[j, i]) for j in order)
    w = np.float32(weight)
    return float(w * v[i] - (np.float32(1) - w) * near)


def _dpp(gram: Any, v: Any, order: list[int], i: int) -> tuple[float, float]:
    """Variance of i given the independent ones of those that were chosen."""
    if not order:
        return 1.0, float(v[i])
    kernel = np.asarray(gram, np.float64) * np.outer(v, v).astype(np.float64)
    basis: list[int] = []
    for j in order:
        if _variance(kernel, basis, j) > _floor(kernel, j):
            basis.append(j)
    left = _variance(kernel, basis, i)
    return (1.0, left) if left > _floor(kernel, i) else (0.0, float(v[i]))


def _floor(kernel: Any, i: int) -> float:
    return max(1e-12, 1e-6 * kernel[i, i])


def _variance(kernel: Any, basis: list[int], i: int) -> float:
    if not basis:
        return kernel[i, i]
    inner = kernel[np.ix_(basis, basis)]
    return kernel[i, i] - kernel[i, basis] @ np.linalg.solve(inner, kernel[basis, i])


def _gain(gram: Any, valid: list[bool], order: list[int], j: int) -> float:
    total = 0.0
    for i in range(len(gram)):
        if valid[i]:
            covered = max([0.0, *(float(gram[s, i]) for s in order)])
            total += max(0.0, min(float(gram[j, i]), 1.0) - covered)
    return total


def embeddings(rng: Any, *shape: int) -> Any:
    """Clusters around a common direction, float32."""
    *lead, n, d = shape
    centres = rng.standard_normal((*lead, max(n // 6, 1), d))
    own = centres[..., rng.integers(0, centres.shape[-2], n), :]
    common = rng.standard_normal((*lead, 1, d))
    x = own + 0.7 * rng.standard_normal(shape) + 0.7 * common
    return x.astype(np.float32)


def ties(rng: Any, batch: int, n: int) -> tuple[Any, Any]:
    """A Gram matrix and importance of few different numbers, exact in float32."""
    gram = np.round(rng.random((batch, n, n)) * 4).astype(np.float32) / 4
    return gram, np.round(rng.random((batch, n)) * 4).astype(np.float32) / 4
