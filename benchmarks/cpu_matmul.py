"""Packed products on a CPU against dequantizing the weight and multiplying by it.

    python -m benchmarks.cpu_matmul [--tag cpu] [--size 2048 4096] [--formats ...]

Random codes, float32 activations, or int8 ones (`int8`). Both sides are one compiled
call; they take turns, and the fastest of each counts. `time` is in milliseconds;
`temporary` is what XLA allocates beside arguments and results, in MB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._results import Row, write
from pallas_kernels import WeightLayout, packed_matmul
from pallas_kernels._dense import dense
from pallas_kernels.tune import random_weights

GROUPS = {"int4": 128, "nf4": 64, "nvfp4": 16}
FORMATS = ("t2", "sherry", "int8", "int4", "nf4", "nvfp4", "float8_e4m3")
TOKENS = (1, 16, 256)


def packed(layout: WeightLayout) -> Callable[..., jax.Array]:
    """The product as the library computes it."""
    return lambda x, planes: packed_matmul(x, planes, layout)


def dequantized(layout: WeightLayout) -> Callable[..., jax.Array]:
    """The whole weight in float32, then a product by XLA."""
    return lambda x, planes: jnp.dot(x.astype(jnp.float32), dense(planes, layout))


def milliseconds(calls: list[Any], args: Any, seconds: float) -> list[float]:
    """The fastest run of each call; they take turns for `seconds`."""
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call(*args))
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return [1e3 * b for b in best]


def measure(layout: WeightLayout, m: int, kind: str, seconds: float) -> list[Row]:
    """Time and temporary memory of one product."""
    (planes,), _ = random_weights(layout, 1, "xla")
    x = jax.random.normal(jax.random.key(1), (m, layout.k), jnp.float32)
    x = jnp.round(40 * x).astype(jnp.int8) if kind == "int8" else x
    calls = [
        jax.jit(f(layout)).lower(x, planes).compile() for f in (packed, dequantized)
    ]
    ms, dense_ms = milliseconds(calls, (x, planes), seconds)
    memory: list[Any] = [c.memory_analysis() for c in calls]
    held = [m.temp_size_in_bytes / 1e6 for m in memory]
    case = {
        "k": layout.k,
        "n": layout.n,
        "m": m,
        "format": layout.format,
        "group": layout.group_size if layout.groups > 1 else "",
        "activations": kind,
    }
    more = held[1] / held[0] if held[0] else None
    return [
        Row(case, "time", ms, "ms", dense_ms, dense_ms / ms),
        Row(case, "temporary", held[0], "MB", held[1], more),
    ]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="cpu")
    parser.add_argument("--size", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--activations", nargs="*", default=["float32", "int8"])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    args = parser.parse_args()
    rows: list[Row] = []
    for size in args.size:
        for fmt in args.formats:
            layout = WeightLayout(
                format=fmt, k=size, n=size, group_size=GROUPS.get(fmt, size)
            )
            for m in args.tokens:
                for kind in args.activations:
                    if kind == "int8" and fmt not in ("t2", "sherry", "int8"):
                        continue
                    new = measure(layout, m, kind, args.seconds)
                    rows += new
                    speed, room = new
                    print(
                        f"{fmt} {size}x{size} m={m} {kind}: {speed.value:.2f} ms, "
                        f"{speed.ratio:.2f}x of {speed.baseline:.2f} ms; "
                        f"{room.value:.1f} MB, {room.baseline:.1f} MB",
                        flush=True,
                    )
    if not args.dry:
        write("cpu_matmul", rows, device_tag=args.tag)


if __name__ == "__main__":
    main()
