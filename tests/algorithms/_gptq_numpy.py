"""GPTQ and GPTAQ in float64 NumPy, column by column, as their papers have them.

Written apart from the library: explicit inverses, no blocks, formats by their formulas.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Int4:
    """Symmetric 4-bit integers: scales amax / 7.5, levels -8..7."""

    def __init__(self, scale_dtype):
        self.dtype = scale_dtype

    def scales(self, w, whole):
        s = np.abs(w).max(axis=1) / 7.5
        return (s.astype(np.float32).astype(self.dtype).astype(np.float64),)

    def nearest(self, w, s):
        return np.clip(np.rint(w / s), -8, 7)

    def values(self, levels, s):
        return levels * s


class Int4Asymmetric(Int4):
    """Levels 0..15 less a zero point; ranges hold 0."""

    def scales(self, w, whole):
        low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
        s = ((high - low) / 15).astype(np.float32).astype(self.dtype).astype(np.float64)
        return s, np.clip(np.rint(-low / s), 0, 15)

    def nearest(self, w, s, z):
        return np.clip(np.rint(w / s + z), 0, 15) - z

    def values(self, levels, s, z):
        return levels * s


class NVFP4:
    """E2M1 in blocks of 16 with E4M3 scales under one scale of the original tensor."""

    def scales(self, w, whole):
        s2 = np.abs(whole).max() / (6 * 448)
        s = np.clip(np.abs(w).max(axis=1) / 6 / s2, 2.0**-9, 448)
        s = s.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return (s * s2,)

    def nearest(self, w, s):
        a = np.abs(w / s)[:, None]
        return np.sign(w) * E2M1[np.argmin(np.abs(a - E2M1), axis=1)]

    def values(self, levels, s):
        return levels * s


def gptq(
    w, h, fmt, group, *, damping=0.01, act_order=False, static=False,
    mismatch=None, alpha=0.0,
):  # fmt: skip
    """Levels `[N, K]` and values of weights `[N, K]`."""
    w, h = w.astype(np.float64).copy(), h.astype(np.float64)
    original = w.copy()
    n, k = w.shape
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(k)
    diagonal = np.diag(h)
    h = h + damping * diagonal[diagonal > 0].mean() * np.eye(k)
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    u = np.linalg.cholesky(inverse).T
    levels, values = np.zeros((n, k)), np.zeros((n, k))
    scales = {}
    for i, column in enumerate(order):
        g = column // group
        if g not in scales:
            source = original if static else w
            scales[g] = fmt.scales(source[:, g * group : (g + 1) * group], original)
        levels[:, column] = fmt.nearest(w[:, column], *scales[g])
        values[:, column] = fmt.values(levels[:, column], *scales[g])
        error = (w[:, column] - values[:, column]) / u[i, i]
        add = np.zeros((n, k - i - 1))
        if mismatch is not None:
            # The error of this input, projected on those that are still free.
            rest = order[i + 1 :]
            free = np.linalg.inv(h[np.ix_(rest, rest)])
            p = alpha * mismatch[column, rest] @ free
            add = np.outer(original[:, column], p)
        for f, later in enumerate(order[i + 1 :]):
            w[:, later] += add[:, f] - error * u[i, i + 1 + f]
    return levels, values


def quads(k, stride):
    """Columns of each four, in the order of the sweep."""
    if stride == 1:
        return [[4 * j + i for i in range(4)] for j in range(k // 4)]
    return [
        [64 * run + j + 16 * i for i in range(4)]
        for run in range(k // 64)
        for j in range(16)
    ]


STATES = [
    [0 if i == zero else signs[i] for i in range(4)]
    for zero in range(4)
    for signs in itertools.product([1, -1], repeat=4)
]


def gptq34(w, h, group, stride, *, damping=0.01):
    """Values of 3:4 ternary weights: all states of four columns are tried."""
    w, h = w.astype(np.float64).copy(), h.astype(np.float64)
    n, k = w.shape
    h = h + damping * np.diag(h).mean() * np.eye(k)
    values, scales = np.zeros((n, k)), {}
    order = quads(k, stride)
    for i, four in enumerate(order):
        g = four[0] // group
        if g not in scales:
            kept = [
                np.sort(np.abs(w[:, q]), axis=1)[:, 1:]
                for q in order
                if q[0] // group == g
            ]
            mean = np.concatenate(kept, axis=1).mean(axis=1).astype(np.float32)
            scales[g] = mean.astype(ml_dtypes.bfloat16).astype(np.float64)
        rest = [c for q in order[i + 1 :] for c in q]
        left = four + rest
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        cost_of = np.linalg.inv(inverse[:4, :4])
        for row in range(n):
            best = np.inf
            for state in STATES:
                wrong = w[row, four] - scales[g][row] * np.array(state)
                cost = wrong @ cost_of @ wrong
                if cost < best - 1e-12:
                    best, least = cost, wrong
            values[row, four] = w[row, four] - least
            w[row, rest] -= least @ cost_of @ inverse[:4, 4:]
    return values


def lstsq34(w, diagonal, h, group, rounds=3):
    """Values of 3:4 weights by turns, and scales under `h`, one group after another."""
    w = w.astype(np.float64)
    n, k = w.shape
    codes, scales = np.zeros((n, k)), np.zeros((n, k // group))
    for row in range(n):
        for g in range(k // group):
            part = slice(g * group, (g + 1) * group)
            a, importance = np.abs(w[row, part]), diagonal[part]
            d = np.sort(a.reshape(-1, 4), axis=1)[:, 1:].mean()
            d = float(np.asarray(d, ml_dtypes.bfloat16))
            for _ in range(rounds):
                cost = importance * (a**2 - (a - d) ** 2)
                keep = np.ones(group)
                for q in range(0, group, 4):
                    keep[q + np.argmin(cost[q : q + 4])] = 0
                d = (importance * a * keep).sum() / (importance * keep).sum()
            codes[row, part] = np.sign(w[row, part]) * keep
            scales[row, g] = np.asarray(d, ml_dtypes.bfloat16)
        for g in range(k // group):
            t = np.zeros(k)
            t[g * group : (g + 1) * group] = codes[row, g * group : (g + 1) * group]
            wrong = w[row] - codes[row] * np.repeat(scales[row], group)
            best = scales[row, g] + t @ h @ wrong / (t @ h @ t)
            scales[row, g] = np.asarray(best, ml_dtypes.bfloat16)
    return codes * np.repeat(scales, group, axis=1)
