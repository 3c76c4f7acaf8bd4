"""What the selectors should do, written out with loops over numpy arrays.

One row of the batch; `q` is `[T, H, D]`, `k` and `v` are `[S, Hkv, D]`. Masks are bool
`[H, blocks, blocks]`. Nothing here comes from the library.
"""

from __future__ import annotations

import math

import numpy as np


def schedule(n: int, alpha: float, keep_ratio: float) -> list[int]:
    """AngelSlim's budgets, as its `generate_exact_k_schedule` makes them."""
    start = int(keep_ratio * n)
    if start != n:
        if n < 56:
            start = n
        elif n < 160:
            start = int(n * 0.2 + 30)
        else:
            start = int(n * 0.1) + 30
    return decay(n, start, alpha)


def decay(n: int, start: int, alpha: float) -> list[int]:
    """`start` as long as rows see no more, then a straight line to `alpha * start`."""
    line = linspace(float(start), start * alpha, n - start)
    return [start] * start + [min(max(math.floor(x), 1), start) for x in line]


def linspace(start: float, end: float, steps: int) -> list[float]:
    """As torch rounds it: from both ends to the middle."""
    if steps < 2:
        return [start] * steps
    step = (end - start) / (steps - 1)
    first = [start + step * i for i in range(steps // 2)]
    return first + [end - step * (steps - 1 - i) for i in range(steps // 2, steps)]


def strided(q: np.ndarray, k: np.ndarray, block: int, stride: int) -> np.ndarray:
    """Anti-diagonal sums `[H, cells, cells]`, of rows filled up with zeros."""
    q, k = (_filled(_expand(x, q.shape[1]), block) for x in (q, k))
    cells = q.shape[0] // stride
    out = np.zeros((q.shape[1], cells, cells))
    for h in range(q.shape[1]):
        for a in range(cells):
            for c in range(cells):
                rows = [a * stride + stride - 1 - t for t in range(stride)]
                columns = [c * stride + t for t in range(stride)]
                out[h, a, c] = (q[rows, h] * k[columns, h]).sum()
    return out


def stem_logits(
    q: np.ndarray,
    v: np.ndarray,
    sums: np.ndarray,
    block: int,
    stride: int,
    weight: float = 0.2,
    valid_mean: bool = False,
    form: str = "zscore",
) -> np.ndarray:
    """Block logits `[H, n, n]` by the steps of AngelSlim's torch backend.

    `sums` are those of `strided`. With `form` "paper" the bonus is the largest log-norm
    of the block, not below 0.
    """
    tokens, heads, dim = q.shape
    scores = sums / (math.sqrt(dim) * stride)
    norms = np.linalg.norm(_filled(_expand(v, heads), block), axis=-1)  # [S, H]
    cells, full = norms.shape[0] // stride, tokens // stride
    each = block // stride
    blocks = cells // each
    bonus = np.zeros((heads, cells))
    for h in range(heads):
        tall = [norms[c * stride : (c + 1) * stride, h].max() for c in range(cells)]
        w = np.log(np.array(tall) + 1e-6)
        z = (w - w[:full].mean()) / (w[:full].std(ddof=1) + 1e-6)
        bonus[h] = weight * np.maximum(z, 0)
    logits = np.zeros((heads, blocks, blocks))
    for h in range(heads):
        for i in range(blocks):
            for j in range(blocks):
                rows = slice(i * each, (i + 1) * each)
                columns = slice(j * each, (j + 1) * each)
                product = scores[h, rows, columns].mean()
                extra = bonus[h, columns].mean()
                if form == "paper":
                    tall = norms[j * block : (j + 1) * block, h].max()
                    extra = weight * max(0, math.log(tall))
                elif valid_mean:
                    extra *= each / math.ceil(min(block, tokens - j * block) / stride)
                if valid_mean:
                    real = [min(block, tokens - x * block) for x in (i, j)]
                    product *= block / real[0] * block / real[1]
                logits[h, i, j] = product + extra if j <= i else -np.inf
    return logits


def stem_mask(
    logits: np.ndarray, budgets: list[int], sink: int, window: int
) -> np.ndarray:
    """The best of each row, and the forced ones."""
    mask = np.zeros(logits.shape, bool)
    for h, i in np.ndindex(logits.shape[:2]):
        order = np.argsort(-logits[h, i], kind="stable")
        for rank, j in enumerate(order):
            if rank < budgets[i] and np.isfinite(logits[h, i, j]):
                mask[h, i, j] = True
        for j in range(i + 1):
            if j < sink or j >= i - (window - 1):
                mask[h, i, j] = True
    return mask


def gap(logits: np.ndarray, budgets: list[int]) -> float:
    """Least distance, over the rows, of the last block taken from the first not."""
    found = np.inf
    for h, i in np.ndindex(logits.shape[:2]):
        row = np.sort(logits[h, i, : i + 1])[::-1]
        if budgets[i] <= i:
            found = min(found, row[budgets[i] - 1] - row[budgets[i]])
    return float(found)


def xattention_mask(
    q: np.ndarray,
    k: np.ndarray,
    block: int,
    stride: int,
    thresholds: list[float],
    keep_ratio: float | None = None,
) -> np.ndarray:
    """XAttention: softmax of the cells, mass of the blocks, cumulative choice."""
    scores, each, real = _cells(q, k, block, stride)
    mass = np.zeros((scores.shape[0], *[scores.shape[1] // each] * 2))
    for h in range(len(scores)):
        for a in range(real):
            row = scores[h, a, : a + 1]
            p = np.exp(row - row.max())
            p /= p.sum()
            for c in range(a + 1):
                mass[h, a // each, c // each] += p[c]
    none = np.zeros(mass.shape, bool)
    return _choose(mass, none, thresholds, keep_ratio)


def cosa_mask(
    q: np.ndarray,
    k: np.ndarray,
    block: int,
    stride: int,
    top_p: list[float],
    keep_ratio: float | None = None,
) -> np.ndarray:
    """CoSA's proxy: highest score of a block, flags of the maxima, ordered choice."""
    scores, each, real = _cells(q, k, block, stride)
    shape = (scores.shape[0], *[scores.shape[1] // each] * 2)
    mass, flag = np.zeros(shape), np.zeros(shape, bool)
    for h in range(shape[0]):
        for a in range(real):
            row = scores[h, a, : a + 1] * math.log2(math.e)
            for j in range(a // each + 1):
                e = 2 ** (row[j * each : (j + 1) * each].max() - row.max())
                mass[h, a // each, j] += e
                flag[h, a // each, j] |= e >= 1 - 1e-3
    return _choose(mass, flag, top_p, keep_ratio)


def _choose(
    mass: np.ndarray, flag: np.ndarray, shares: list[float], keep_ratio: float | None
) -> np.ndarray:
    mask = np.zeros(mass.shape, bool)
    for h, i in np.ndindex(mass.shape[:2]):
        total = mass[h, i].sum()
        forced = sorted({0, i})
        others = [j for j in range(i + 1) if j not in forced]
        others.sort(key=lambda j, h=h, i=i: (not flag[h, i, j], -mass[h, i, j]))
        before = 0.0
        limit = None
        if keep_ratio is not None:
            limit = max(math.floor(keep_ratio * (i + 1) + 0.5), len(forced))
        for taken, j in enumerate(forced + others):
            enough = before >= shares[h] * total if limit is None else taken >= limit
            if j in forced or not enough:
                mask[h, i, j] = True
            before += mass[h, i, j]
    return mask


def _cells(
    q: np.ndarray, k: np.ndarray, block: int, stride: int
) -> tuple[np.ndarray, int, int]:
    scores = strided(q, k, block, stride) / (math.sqrt(q.shape[-1]) * stride)
    return scores, block // stride, math.ceil(q.shape[0] / stride)


def _expand(x: np.ndarray, heads: int) -> np.ndarray:
    return np.repeat(x.astype(np.float64), heads // x.shape[1], axis=1)


def _filled(x: np.ndarray, block: int) -> np.ndarray:
    rest = -x.shape[0] % block
    return np.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1))
