"""Times of attention on a GPU that its power limit slows down.

A GPU under full load lowers its clock within tens of milliseconds, so kernels timed one
after the other have not the same machine. `alternate` gives all of them turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

_ROUNDS = 5
PEAK = 989.4e12  # dense bfloat16 FLOP/s of an H100 SXM


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 0.1,
    rounds: int = _ROUNDS,
) -> dict[str, float]:
    """Median seconds of each call; they take turns, `rounds` times.

    Args:
      calls: start work on the device and return arrays; compiled before.
      seconds: of one turn.
      rounds: turns of each.

    Returns:
      Seconds of one call, by name.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        counts[name] = max(2, int(seconds / (time.perf_counter() - start)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                out = call()
            jax.block_until_ready(out)
            found[name].append((time.perf_counter() - start) / counts[name])
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


def causal_flops(batch: int, heads: int, tokens: int, dim: int) -> float:
    """FLOP of dense causal attention."""
    return 4 * batch * heads * dim * tokens * tokens / 2
