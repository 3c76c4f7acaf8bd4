"""Times of operations on a device, inside one compiled program."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Rotating weights must not fit in the last-level cache; H100 and H200 have 50 MB.
CACHE = 150e6


def compile_loop(
    f: Callable[[jax.Array, Any], jax.Array], x: jax.Array, weights: Sequence[Any]
) -> Callable[[int], float]:
    """A program that runs `f(x, w)` over all weights, again and again.

    Launches from Python cost more than what is timed here, so the loop is compiled; the
    weights rotate, so that together they must not fit in the cache; every result is
    kept alive, or XLA would drop the others.

    Args:
      f: the operation.
      x: its first argument.
      weights: second arguments, more bytes than the last-level cache holds.

    Returns:
      Rounds over all weights -> seconds by the wall clock.
    """

    def run(x: jax.Array, weights: Any, count: jax.Array) -> Any:
        def body(_: Any, carry: Any) -> Any:
            x, _ = carry
            out = []
            for w in weights:
                x, y = lax.optimization_barrier((x, f(x, w)))
                out.append(y)
            return x, tuple(out)

        shapes = [jax.eval_shape(f, x, w) for w in weights]
        empty = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
        return lax.fori_loop(0, count, body, (x, empty))

    compiled = jax.jit(run).lower(x, weights, jnp.int32(1)).compile()

    def once(count: int) -> float:
        n = jnp.int32(count)
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, weights, n))
        return time.perf_counter() - start

    return once


def microseconds(
    once: Callable[[int], float], n_weights: int, *, seconds: float = 0.02
) -> float:
    """Time of one operation of what `compile_loop` gives.

    The time of an empty call cancels in the difference of two lengths.

    Args:
      once: rounds -> seconds.
      n_weights: operations in a round.
      seconds: length of one measurement.

    Returns:
      Microseconds, the best of three measurements.
    """
    once(2)
    short = min(once(2) for _ in range(3))
    more = max(4, int(seconds / max(short / 2, 1e-5)))
    best = float("inf")
    for _ in range(3):
        short = min(once(2) for _ in range(2))
        best = min(best, (once(2 + more) - short) / more / n_weights)
    return best * 1e6
