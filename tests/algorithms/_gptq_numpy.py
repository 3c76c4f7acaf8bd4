"""GPTQ and GPTAQ in float64 NumPy, column by column, as their papers have them.

Written apart from the library: explicit inverses, no blocks, formats by their formulas.
"""

from __future__ import annotations

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
