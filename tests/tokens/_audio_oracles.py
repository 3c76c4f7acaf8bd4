"""Merging of audio tokens as loops in numpy's float64, one clip at a time.

Each returns what it keeps and `margin`, how near the closest of its decisions was to
the other outcome: float32 may decide those below rounding differently.
"""

import numpy as np


def cosine(a, b):
    return float(a @ b / ((np.linalg.norm(a) + 1e-8) * (np.linalg.norm(b) + 1e-8)))


def weighted_mean(x, weights, members):
    w = np.asarray([weights[j] for j in members])
    if w.sum() <= 0:
        w = np.ones(len(members))
    return sum(wj * x[j] for wj, j in zip(w, members, strict=True)) / w.sum()


def group(x, threshold):
    """Groups from left to right, and the score with which each member joined."""
    groups, scores, margin = [[0]], {}, np.inf
    for i in range(1, len(x)):
        score = np.mean([cosine(x[t], x[i]) for t in groups[-1]])
        margin = min(margin, abs(score - threshold))
        if score >= threshold:
            scores[i] = score
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups, scores, margin


def dpp(rows, relevance, count):
    """Greedy MAP with one Cholesky row for each choice."""
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    factor = np.zeros((count, len(rows)))
    left = kernel.diagonal().copy()
    chosen, margin = [], np.inf
    for t in range(count):
        j = int(np.argmax(left))
        others = np.delete(left, j)
        others = others[np.isfinite(others)]
        if len(others):
            margin = min(margin, (left[j] - others.max()) / left[j])
        chosen.append(j)
        new = (kernel[j] - factor[:t, j] @ factor[:t]) / np.sqrt(left[j])
        factor[t] = new
        left = left - new**2
        left[j] = -np.inf
    return chosen, margin


def mmr(rows, relevance, count, weight):
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8)
    similar = unit @ unit.T
    scaled = relevance / relevance.max()
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min() + 1e-6)
    chosen, margin = [int(np.argmax(scaled))], np.inf
    while len(chosen) < count:
        score = weight * scaled - (1 - weight) * similar[chosen].max(0)
        score[chosen] = -np.inf
        top = np.sort(score)
        margin = min(margin, top[-1] - top[-2])
        chosen.append(int(np.argmax(score)))
    return chosen, margin


def prune(groups, rows, itself, count, pruner, weight=0.5):
    relevance = np.asarray([np.mean([itself[j] for j in g]) for g in groups])
    if pruner == "dpp":
        chosen, margin = dpp(rows, relevance, count)
    else:
        chosen, margin = mmr(rows, relevance, count, weight)
    chosen.sort()
    return [groups[g][0] for g in chosen], rows[chosen], margin


def samp(x, received, itself, count, threshold, *, pruner="dpp", with_self=False):
    groups, scores, margin = group(x, threshold)
    if len(groups) < count:  # the worst members leave again
        if with_self:
            scores = {
                i: ((i - g[0]) * scores[i] + 1) / (i - g[0] + 1)
                for g in groups
                for i in g[1:]
            }
        ranked = sorted(scores, key=lambda i: scores[i])
        free = set(ranked[: count - len(groups)])
        values = sorted(scores.values())
        cut = count - len(groups)
        if cut < len(values):
            margin = min(margin, values[cut] - values[cut - 1])
        groups = [[j for j in g if j not in free] for g in groups]
        groups = sorted(groups + [[j] for j in free])
    rows = np.stack([weighted_mean(x, received, g) for g in groups])
    if len(groups) == count:
        return [g[0] for g in groups], rows, margin
    first, rows, close = prune(groups, rows, itself, count, pruner)
    return first, rows, min(margin, close)


def fastadasp(x, received, itself, count, *, pruner=None, threshold=None):
    cosines = [cosine(x[i], x[i + 1]) for i in range(len(x) - 1)]
    ranked = sorted(range(len(cosines)), key=lambda i: -cosines[i])
    number, margin = len(x) - count, np.inf
    if pruner is not None:
        number = min(number, sum(c > threshold for c in cosines))
        margin = min([abs(c - threshold) for c in cosines], default=np.inf)
    if number < len(ranked):
        gap = cosines[ranked[number - 1]] - cosines[ranked[number]]
        margin = min(margin, gap if number else np.inf)
    closed = set(ranked[:number])
    groups, i = [], 0
    while i < len(x):
        members = [i]
        while i in closed:
            i += 1
            members.append(i)
        groups.append(members)
        i += 1
    rows = np.stack([weighted_mean(x, received, g) for g in groups])
    if pruner is None:
        return [g[0] for g in groups], rows, margin
    first, rows, close = prune(groups, rows, itself, count, pruner)
    return first, rows, min(margin, close)


def atome(x, received, itself, count, *, pruner=None, threshold=None):
    groups, margin = [[i] for i in range(len(x))], np.inf
    while len(groups) > count:
        rows = np.stack([weighted_mean(x, received, g) for g in groups])
        pairs = [cosine(rows[i], rows[i + 1]) for i in range(0, len(rows) - 1, 2)]
        number = min(len(groups) - count, len(pairs))
        if pruner is not None:
            number = min(number, sum(c > threshold for c in pairs))
            margin = min([margin, *(abs(c - threshold) for c in pairs)])
        ranked = sorted(range(len(pairs)), key=lambda i: -pairs[i])
        if 0 < number < len(pairs):
            gap = pairs[ranked[number - 1]] - pairs[ranked[number]]
            margin = min(margin, gap)
        merged, out, i = set(ranked[:number]), [], 0
        while i < len(groups):
            if i % 2 == 0 and i // 2 in merged:
                out.append(groups[i] + groups[i + 1])
                i += 2
            else:
                out.append(groups[i])
                i += 1
        groups = out
        if pruner is not None:
            break
    rows = np.stack([weighted_mean(x, received, g) for g in groups])
    if pruner is None:
        return [g[0] for g in groups], rows, margin
    first, rows, close = prune(groups, rows, itself, count, pruner)
    return first, rows, min(margin, close)


def pool(attn, factor, length, relevance):
    """Attention received and paid to itself, cell by cell, of `[H, pN, pN]`."""
    n = attn.shape[1] // factor
    most, mean = attn.max(0), attn.mean(0)

    def cell(a, i, j):
        rows = a[factor * i : factor * (i + 1), factor * j : factor * (j + 1)]
        return rows.mean(0).sum()

    received = [sum(cell(most, i, j) for i in range(length)) / n for j in range(n)]
    source = mean if relevance == "mean" else most
    return np.array(received), np.array([cell(source, j, j) for j in range(n)])
