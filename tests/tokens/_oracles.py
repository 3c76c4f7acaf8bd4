"""The published algorithms once more, in NumPy, one token after the other.

Each takes plain arrays of one image without padding and gives the kept indices in the
order of choice. Equal scores go to the lowest index.
"""

from __future__ import annotations

import numpy as np

F = np.float32


def keep_of(drop_ratio: float, n: int) -> int:
    k = int(round(n * (1.0 - drop_ratio)))
    return 1 if drop_ratio < 1 and k == 0 and n > 0 else k


def unit(x: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    x = x.astype(F)
    return x / (np.sqrt((x * x).sum(-1, keepdims=True)) + F(eps))


def top(scores: np.ndarray, k: int) -> list[int]:
    """`torch.topk` with ties by index."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k]


def idpruner(
    x: np.ndarray, raw: np.ndarray, k: int, lam: float = 0.5, parallel: int = 1
) -> list[int]:
    n = len(x)
    raw = raw.astype(F)
    imp = (raw - raw.min()) / (raw.max() - raw.min() + F(1e-6))
    sim = unit(x) @ unit(x).T
    picked: list[int] = []
    free = np.ones(n, bool)
    nearest = np.full(n, -2, F)
    while len(picked) < k:
        score = imp.copy() if not picked else F(lam) * imp - F(1 - lam) * nearest
        score[~free] = -np.inf
        new = top(score, min(parallel, k - len(picked)))
        picked += new
        free[new] = False
        nearest = np.maximum(nearest, sim[:, new].max(1))
    return picked


def divprune(x: np.ndarray, k: int) -> list[int]:
    far = 1 - unit(x) @ unit(x).T
    np.fill_diagonal(far, np.inf)
    first = int(np.argmax(far.min(1))) if len(x) > 1 else 0
    picked = [first]
    nearest = far[:, first].copy()
    while len(picked) < k:
        score = nearest.copy()
        score[picked] = -1
        picked.append(int(np.argmax(score)))
        nearest = np.minimum(nearest, far[:, picked[-1]])
    return picked


def scope(x: np.ndarray, attn: np.ndarray, k: int, alpha: float = 1.0) -> list[int]:
    sim = (unit(x) @ unit(x).T).astype(np.float64)
    covered = np.zeros(len(x))
    picked: list[int] = []
    for _ in range(k):
        gains = np.full(len(x), -np.inf)
        for j in range(len(x)):
            if j not in picked:
                gain = sum(max(0.0, sim[i, j] - covered[i]) for i in range(len(x)))
                gains[j] = gain * float(attn[j]) ** alpha
        picked.append(int(np.argmax(gains)))
        covered = np.maximum(covered, sim[picked[-1]])
    return picked


def cdpruner(x: np.ndarray, relevance: np.ndarray, k: int) -> list[int]:
    """Greedy MAP by determinants, not by the Cholesky update."""
    q = relevance.astype(np.float64)
    r = (q - q.min() + 1e-6) / (q.max() - q.min() + 1e-6)
    kernel = r[:, None] * (unit(x) @ unit(x).T).astype(np.float64) * r
    picked: list[int] = []
    for _ in range(k):
        best, chosen = -np.inf, -1
        for i in range(len(x)):
            if i not in picked:
                some = [*picked, i]
                sign, log = np.linalg.slogdet(kernel[np.ix_(some, some)])
                if sign > 0 and log > best:
                    best, chosen = log, i
        picked.append(chosen)
    return picked


def dart(
    x: np.ndarray,
    keys: np.ndarray,
    k: int,
    image_pivots: int = 4,
    text: np.ndarray | None = None,
    text_pivots: int = 4,
) -> list[int]:
    images = top(np.abs(keys).sum(-1), min(image_pivots, len(x), k))
    pivots = [x[i] for i in images]
    if text is not None:
        pivots += [
            text[i] for i in top(np.abs(text).sum(-1), min(text_pivots, len(text)))
        ]
    kept = list(images)
    each = -(-max(0, k - len(kept)) // len(pivots))
    for pivot in pivots:
        cos = unit(x) @ unit(pivot[None])[0]
        cos[kept] = np.inf
        number = min(each, k - len(kept), len(x) - len(kept))
        kept += top(-cos, number)
    return kept


def hiprune(
    shallow: np.ndarray, deep: np.ndarray, k: int, alpha: float, width: int
) -> list[int]:
    """With neighbours across the border of the image left out."""
    n = len(deep)
    number = int(round(k * alpha / 5.0))
    if alpha > 0 and number == 0 and k >= 5:
        number = 1
    anchors = top(shallow, number)
    near = set()
    for a in anchors:
        row, column = divmod(a, width)
        for r, c in ((row, column - 1), (row, column + 1), (row - 1, column),
                     (row + 1, column)):  # fmt: skip
            if 0 <= c < width and 0 <= r and r * width + c < n:
                near.add(r * width + c)
    kept = anchors + sorted(near - set(anchors))
    score = deep.astype(np.float64)
    score[kept] = -np.inf
    return (kept + top(score, max(0, k - len(kept))))[:k]


def hiprune_published(
    shallow: np.ndarray, deep: np.ndarray, k: int, alpha: float, width: int
) -> set[int]:
    """As AngelSlim has it, flat places for neighbours."""
    n, number = len(deep), int(round(k * alpha / 5.0)) or int(alpha > 0 and k >= 5)
    kept = set()
    for a in top(shallow, number):
        for step in (0, -1, 1, -width, width):
            kept.add(min(max(a + step, 0), n - 1))
    score = deep.astype(np.float64)
    score[list(kept)] = -np.inf
    return kept | set(top(score, k - len(kept)))


def vispruner(x: np.ndarray, attn: np.ndarray, k: int, ratio: float = 0.5) -> list[int]:
    number = int(round(k * ratio))
    if k > 1 and number >= k:
        number = k - 1
    important = top(attn, number)
    rest = [i for i in range(len(x)) if i not in important]
    rows = unit(x)
    while len(rest) > k - number:
        count = min(8, len(rest) // 2, len(rest) - (k - number))
        if count <= 0:
            break
        even, odd = rest[::2], rest[1::2]
        nearest = (rows[even] @ rows[odd].T).max(-1)
        gone = {even[i] for i in top(nearest, count)}
        rest = [i for i in rest if i not in gone]
    return important + rest


def visionzip(
    x: np.ndarray,
    keys: np.ndarray,
    attn: np.ndarray,
    k: int,
    ratio: float = 10 / 64,
    merge: str = "mean",
) -> tuple[list[int], np.ndarray]:
    """The order, and the merged rows in the order of places."""
    n = len(x)
    targets = max(1, int(round(k * ratio)))
    dominant = top(attn, max(0, k - targets))
    rest = [i for i in range(n) if i not in dominant]
    step = max(1, len(rest) // targets)
    target = rest[::step][:targets]
    members: dict[int, list[int]] = {t: [] for t in target}
    rows = unit(keys)
    for i in rest:
        if i not in target:
            members[target[int(np.argmax(rows[target] @ rows[i]))]].append(i)
    merged = []
    for i in sorted(dominant + target):
        row, joined = x[i].astype(np.float64), members.get(i, [])
        if joined and merge == "mean":
            row = (row + x[joined].sum(0)) / (1 + len(joined))
        elif joined:
            row = row + x[joined].mean(0)
        merged.append(row)
    return dominant + target, np.array(merged)


def tome(
    x: np.ndarray, k: int, sizes: np.ndarray | None = None
) -> tuple[list[int], np.ndarray]:
    """Kept places and rows; what is compared is the merged rows themselves."""
    places = list(range(len(x)))
    rows = [row.astype(np.float64) for row in x]
    size = [1.0] * len(x) if sizes is None else [float(s) for s in sizes]
    while len(rows) > k:
        r = min(len(rows) // 2, len(rows) - k)
        a, b = list(range(0, len(rows), 2)), list(range(1, len(rows), 2))
        scores = unit(np.array(rows))[a] @ unit(np.array(rows))[b].T
        sources = top(scores.max(-1), r)
        total = [row * s for row, s in zip(rows, size, strict=True)]
        new = list(size)
        for s in sources:
            to = b[int(np.argmax(scores[s]))]
            total[to] = total[to] + rows[a[s]] * size[a[s]]
            new[to] += size[a[s]]
        gone = {a[s] for s in sources}
        left = [i for i in range(len(rows)) if i not in gone]
        rows = [total[i] / new[i] for i in left]
        size = [new[i] for i in left]
        places = [places[i] for i in left]
    return places, np.array(rows)


def prumerge(
    x: np.ndarray, keys: np.ndarray, attn: np.ndarray, k: int, neighbours: int = 32
) -> tuple[list[int], np.ndarray]:
    kept = top(attn, k)
    rows, merged = unit(keys), {}
    for i in kept:
        others = [j for j in range(len(x)) if j != i]
        cos = rows[others] @ rows[i]
        near = [others[j] for j in top(cos, min(neighbours, len(others)))]
        merged[i] = x[i] + sum(attn[j] * x[j] for j in near)
    return kept, np.array([merged[i] for i in sorted(kept)])


def outliers(attn: np.ndarray) -> int:
    q1, q3 = np.percentile(attn, 25), np.percentile(attn, 75)
    return int((attn > q3 + 1.5 * (q3 - q1)).sum())


def received_attention(q: np.ndarray, k: np.ndarray, unit_size: int) -> np.ndarray:
    """`[N, heads, d]`."""
    n, heads, d = q.shape
    found = np.zeros(n)
    for h in range(heads):
        for i in range(n):
            logits = k[:, h] @ q[i, h] / np.sqrt(d)
            weight = np.exp(logits - logits.max())
            found += weight / weight.sum() / heads
    return np.array([found[i : i + unit_size].sum() for i in range(0, n, unit_size)])


def score(
    wq: np.ndarray, bq: np.ndarray, wk: np.ndarray, bk: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The scorer with its N x N matrix; weights `[h, D]`."""
    q, k = x @ wq.T + bq, x @ wk.T + bk
    return (q @ k.T / np.sqrt(len(bq))).mean(-1)


def shares(count: int, weight: np.ndarray, size: np.ndarray, least: int) -> list[int]:
    """Largest remainder, after fixing groups at their bounds one after the other."""
    low = np.minimum(size, least)
    fixed: dict[int, int] = {}
    while True:
        free = [g for g in range(len(size)) if g not in fixed]
        left = count - sum(fixed.values())
        total = sum(weight[g] for g in free)
        exact = {g: left * weight[g] / total for g in free}
        above = {g: int(size[g]) for g in free if exact[g] > size[g]}
        below = {g: int(low[g]) for g in free if exact[g] < low[g]}
        if not above and not below:
            break
        # Fix the side that is off by more, and look again.
        over = sum(exact[g] - size[g] for g in above)
        under = sum(low[g] - exact[g] for g in below)
        fixed |= above if over >= under else below
    whole = {g: int(np.floor(exact[g] + 1e-9)) for g in free}
    rest = left - sum(whole.values())
    for g in sorted(free, key=lambda g: (-(exact[g] - whole[g]), g))[:rest]:
        whole[g] += 1
    return [fixed.get(g, whole.get(g, 0)) for g in range(len(size))]
