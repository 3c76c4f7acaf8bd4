"""Times of operations on a device, inside one compiled program."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Rotating weights must not fit in the last-level cache; H100 and H200 have 50 MB. More
# than MOST of them in one program, and the host cannot launch them fast enough.
CACHE, MOST = 150e6, 128


def rotation(nbytes: float) -> int:
    """How many weights of so many bytes take turns."""
    return max(2, min(MOST, int(CACHE / nbytes) + 1))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A compiled program that runs an operation many times.

    Attributes:
      run: calls the program so many times, waits, and gives the seconds by the wall
        clock.
      operations: in one call.
    """

    run: Callable[[int], float]
    operations: int


def compile_loop(
    f: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    weights: Sequence[Any],
    guess: float = 10.0,
) -> Loop:
    """A program that runs `f(x, w)` over all weights, again and again.

    Launches from Python cost more than what is timed here, so the loop is compiled; its
    length is a constant, or a GPU would tell the host after each round whether to go
    on. The weights rotate, so that together they must not fit in the cache; every
    result is kept alive, or XLA would drop the others.

    Args:
      f: the operation.
      x: its first argument.
      weights: second arguments, more bytes than the last-level cache holds.
      guess: microseconds of one operation, roughly; a call takes some milliseconds.

    Returns:
      The program.
    """
    rounds = max(2, int(4000 / (guess * len(weights))))

    def run(x: jax.Array, weights: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            x, _ = carry
            out = []
            for w in weights:
                x, y = lax.optimization_barrier((x, f(x, w)))
                out.append(y)
            return x, tuple(out)

        shapes = [jax.eval_shape(f, x, w) for w in weights]
        empty = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
        return lax.fori_loop(0, rounds, body, (x, empty))

    compiled = jax.jit(run).lower(x, weights).compile()

    def once(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(x, weights)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return Loop(once, rounds * len(weights))


def microseconds(loop: Loop, *, seconds: float = 0.02) -> float:
    """Time of one operation.

    What a call costs beside its operations cancels in the difference of two lengths.

    Args:
      loop: of `compile_loop`.
      seconds: length of one measurement.

    Returns:
      Microseconds, from the best of some measurements.

    Raises:
      RuntimeError: other work on the machine disturbs every measurement.
    """
    loop.run(2)
    for _ in range(5):
        short = min(loop.run(1) for _ in range(3))
        more = max(1, round(seconds / short))
        # Each minimum by itself: what disturbs a short run would else count as speed.
        long = min(loop.run(1 + more) for _ in range(3))
        short = min(short, *(loop.run(1) for _ in range(2)))
        # A call of more operations than another cannot be the shorter one, and the
        # beginning of a call takes less than all of its operations.
        each = (long - short) / more
        if each > short / 4:
            return each / loop.operations * 1e6
    raise RuntimeError("the times of this loop make no sense: is the machine busy?")
