"""Time of the largest logits of few rows: what XLA selects with, and `top_logits`.

    python -m benchmarks.top_logits [--tag h100] [--smoke]

One compiled loop, as one CUDA graph, in which each pass changes one logit of each row
by what the last found; `loop` is that alone, and is in the other times as well. Shapes
are those of drafts (1 and 5 rows of a draft vocabulary) and of token recycling (16).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._results import RESULTS, Row, write
from benchmarks._speculative_runs import LOOPS
from benchmarks.decode_round import seconds
from pallas_kernels import top_logits
from pallas_kernels._devices import implementation_for

SHAPES = [(1, 16384, 4), (5, 16384, 5), (5, 49152, 5), (16, 49152, 8), (16, 151936, 8)]
PASSES = 200


def passes(rows: int, size: int, k: int, way: str) -> Callable[..., jax.Array]:
    """`(logits, count) -> all that the last pass found`, so that none is left out."""

    def one(_: Any, carry: Any) -> Any:
        x, values, ids = carry
        x = x.at[:, :1].set(values[:, -1:])
        if way != "loop":
            values, ids = top_logits(x, k, log_probs=True, implementation=way)
        return x, values, ids

    def run(x: jax.Array, count: jax.Array) -> jax.Array:
        start = x, jnp.zeros((rows, k)), jnp.zeros((rows, k), jnp.int32)
        found = jax.lax.fori_loop(0, count, one, start)
        return found[0][:, :1] + found[1] + found[2]

    return run


def measure(shapes: Sequence[tuple[int, int, int]], loop: str) -> list[Row]:
    """Rows by shape and way."""
    ways = ["loop", "xla"]
    if implementation_for() == "mosaic_gpu":
        ways.append("mosaic_gpu")
    cases = [(*shape, way) for shape in shapes for way in ways]

    def compiled(case: Any) -> Any:
        rows, size, *_ = case
        x = jax.ShapeDtypeStruct((rows, size), jnp.float32)
        lowered = jax.jit(passes(*case)).lower(x, jax.ShapeDtypeStruct((), jnp.int32))
        return lowered.compile(compiler_options=LOOPS[loop])

    with ThreadPoolExecutor(8) as pool:
        programs = dict(zip(cases, pool.map(compiled, cases), strict=True))
    counts = {n: jnp.int32(n) for n in (PASSES // 8, PASSES)}
    found: list[Row] = []
    base = 0.0
    for (rows, size, k, way), program in programs.items():
        x = jax.random.normal(jax.random.key(0), (rows, size))
        call = functools.partial(_call, program, jax.block_until_ready(x), counts)
        time = seconds(call, *counts) * 1e6
        base = time if way == "xla" else base
        case = {"rows": rows, "vocabulary": size, "k": k, "way": way}
        of = {"baseline": base, "ratio": base / time} if way == "mosaic_gpu" else {}
        found.append(Row(case, "time", time, "us", **of))
    return found


def _call(program: Any, x: jax.Array, counts: Any, count: int) -> Any:
    return program(x, counts[count])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--loop", choices=LOOPS, default="captured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds, on any device")
    args = parser.parse_args(arguments)
    rows = measure([(2, 512, 3)] if args.smoke else SHAPES, args.loop)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        print(dict(row.case), f"{row.metric} {row.value:.3g} {row.unit} {ratio}")
    print(write("top_logits", rows, device_tag=args.tag, directory=args.out))


if __name__ == "__main__":
    main()
