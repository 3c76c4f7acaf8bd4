"""How many key blocks each query block reads: tables made while tracing."""

from __future__ import annotations

import functools

import numpy as np

Pair = tuple[float, float]


def decayed(num_blocks: int, start: int, alpha: float) -> np.ndarray:
    """Budgets that fall from `start` to `alpha * start` along the prompt.

    The first `start` query blocks see no more blocks than that; from there on the
    budget falls in a straight line (Stem, arXiv 2603.06274, token position decay; the
    form is AngelSlim's).

    Args:
      num_blocks: of the prompt.
      start: budget of the first row.
      alpha: what is left of it in the last one; 1 for no decay.

    Returns:
      int32 `[num_blocks]`, from 1 to `start`.
    """
    budgets = np.full(num_blocks, start, np.int32)
    steps = num_blocks - start
    if steps > 0:
        ideal = np.full(steps, float(start))
        if steps > 1:
            step = (start * alpha - start) / (steps - 1)
            place = np.arange(steps)
            # From both ends to the middle, as torch's linspace rounds it.
            late = start * alpha - step * (steps - 1 - place)
            ideal = np.where(place < steps // 2, start + step * place, late)
        budgets[start:] = np.clip(np.floor(ideal), 1, start)
    return budgets


def length_rule(
    num_blocks: int, limits: tuple[int, int], rates: Pair, biases: tuple[int, int]
) -> int:
    """AngelSlim's first budget: all blocks, then 20 % and 30, then 10 % and 30."""
    dense_below, long_from = limits
    if num_blocks < dense_below:
        return num_blocks
    if num_blocks < long_from:
        first = int(num_blocks * rates[0] + biases[0])
    else:
        first = int(num_blocks * rates[1]) + biases[1]
    return max(1, min(first, num_blocks))


def seen(num_blocks: int) -> np.ndarray:
    """Blocks up to the diagonal of each row."""
    return np.arange(1, num_blocks + 1, dtype=np.int32)


def forced(num_blocks: int, sink: int, window: int) -> np.ndarray:
    """Blocks of each row that are among the first `sink` or the last `window`."""
    return np.minimum(seen(num_blocks), sink + window)


def shares(num_blocks: int, ratio: float, least: np.ndarray) -> np.ndarray:
    """Budgets that are the same share of what each row sees, rounded, or `least`."""
    wanted = np.floor(ratio * seen(num_blocks) + 0.5).astype(np.int32)
    return np.minimum(np.maximum(wanted, least), seen(num_blocks))


@functools.lru_cache(maxsize=256)
def at_density(
    num_blocks: int, ratio: float, alpha: float, sink: int, window: int
) -> tuple[int, ...]:
    """Decayed budgets with which a share `ratio` of the causal blocks is read.

    The forced blocks count. The largest first budget that does not exceed the share is
    taken, and what is missing is given to the first rows, one block each; so the share
    is met to one block, where the forced blocks leave room.

    Returns:
      One budget for each row, forced blocks included.
    """
    rows, least = seen(num_blocks), forced(num_blocks, sink, window)

    def read(start: int) -> np.ndarray:
        return np.minimum(np.maximum(decayed(num_blocks, start, alpha), least), rows)

    wanted = int(np.floor(ratio * rows.sum() + 0.5))
    low, high = 1, num_blocks
    while low < high:
        middle = (low + high + 1) // 2
        fits = read(middle).sum() <= wanted
        low, high = (middle, high) if fits else (low, middle - 1)
    budgets = read(low)
    # A row that reads all it sees has no room.
    room = np.flatnonzero(budgets < rows)
    budgets[room[: max(0, wanted - int(budgets.sum()))]] += 1
    return tuple(budgets.tolist())
