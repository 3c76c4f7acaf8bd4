"""Packed products on a GPU against bfloat16 by XLA, in one run.

    python -m benchmarks.packed_matmul [--tag h200] [--seconds 400] [--only NAME]

Random codes; times of whole products: bfloat16 activations in (A16; `a8` quantizes them
in the product), or int8 ones (`int8`); scales applied, bfloat16 out. Plans are those
that `implementation=None` takes. `roofline` is the share of the device's memory
bandwidth (packed bytes and activations over time) or of its peak, the larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._results import Row, write
from pallas_kernels import WeightLayout, implementation_for
from pallas_kernels._timing import compile_loop, microseconds, rotation
from pallas_kernels.tune import (
    activations,
    compiled,
    module_of,
    product,
    random_weights,
)

# Measured device copies and products (bytes/s, bf16 FLOP/s); 8-bit counts double.
LIMITS = {"H100": (3.0e12, 790e12), "H200": (4.3e12, 790e12)}
GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MAIN, FIRST, BIG, SQUARE = (4096, 14336), (4096, 4096), (8192, 28672), (8192, 8192)
REST = [(14336, 4096), (4096, 6144), (1024, 3072), (3072, 1024)]
BITNET = [
    (2560, 2560),
    (2560, 3840),
    (6912, 2560),
    (2560, 13824),
    (3200, 3200),
    (3200, 4800),
    (3200, 10240),
    (10240, 3200),
]
ACTIVATIONS = {"int8": "int8", "a8": "int8-from-bfloat16", "bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One product."""

    shape: tuple[int, int]
    m: int
    format: str = "bfloat16"
    group: int | None = None
    activations: str = "bfloat16"

    @property
    def layout(self) -> WeightLayout:
        """Of the weight, canonical."""
        k, n = self.shape
        return WeightLayout(format=self.format, k=k, n=n, group_size=self.group or k)

    @property
    def nbytes(self) -> float:
        """Of the weight with its scales."""
        bits = {"t2": 2, "sherry": 1.25, "int4": 4, "nvfp4": 4, "bfloat16": 16}
        each = bits.get(self.format, 8)
        scale = 0 if self.group is None else 8 if self.format == "nvfp4" else 16
        return self.shape[0] * self.shape[1] * (each + scale / (self.group or 1)) / 8

    def floor(self, bandwidth: float, peak: float) -> float:
        """Microseconds that memory or arithmetic take at least."""
        k, n = self.shape
        rate = peak if self.activations == "bfloat16" else 2 * peak
        x = self.m * k * (1 if self.activations == "int8" else 2)
        return max((self.nbytes + x) / bandwidth, 2 * self.m * k * n / rate) * 1e6


TERNARY = [("t2", None, "int8"), ("sherry", None, "int8")]
LINEAR = [("t2", None, "a8"), ("sherry", None, "a8"), ("sherry", None, "bfloat16")]
GROUPED = [("t2", 128, "int8"), ("sherry", 128, "int8")]
WEIGHT_ONLY = [
    ("int4", 128, "bfloat16"),
    ("int8", None, "bfloat16"),
    ("float8_e4m3", None, "bfloat16"),
    ("nvfp4", 16, "bfloat16"),
]
W8A8 = [("int8", None, "int8")]


def cases() -> dict[str, list[Case]]:
    """Cases by name, what matters most first."""

    def over(shapes: Any, tokens: Any, kinds: Any) -> list[Case]:
        return [Case(s, m, *kind) for s in shapes for m in tokens for kind in kinds]

    return {
        "ternary": over((FIRST, MAIN, BIG), (1, 2, 4, 8), TERNARY),
        "linear": over((FIRST, MAIN, BIG), (1,), LINEAR),
        "weight_only": over((SQUARE, MAIN, BIG), (1,), WEIGHT_ONLY),
        "gemm": over((MAIN,), (256, 2048), TERNARY + GROUPED + W8A8),
        "int4": over((SQUARE,), (8, 16, 32, 64, 128, 256), WEIGHT_ONLY[:1]),
        "grid_main": over((MAIN,), GRID, TERNARY + WEIGHT_ONLY[:1] + W8A8),
        "bitnet": over(BITNET, (1,), TERNARY + LINEAR[:2]),
        "grid_first": over((FIRST,), GRID, TERNARY + WEIGHT_ONLY[:1]),
        "grid_big": over((BIG,), GRID, TERNARY),
        "rest": over(REST + [SQUARE], (1, 8, 64, 512), TERNARY),
    }


def main() -> None:
    """Measures until the time is over and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=None, choices=list(cases()))
    args = parser.parse_args()
    start = time.time()
    kind = jax.devices()[0].device_kind
    limits = next((v for k, v in LIMITS.items() if k in kind), (1e12, 1e14))
    wanted = [
        c
        for name, some in cases().items()
        for c in some
        if args.only is None or name in args.only
    ]
    wanted = list(dict.fromkeys(wanted))
    # Dense twins first: they are the baseline of what follows.
    jobs = list(dict.fromkeys(job for c in wanted for job in (Case(c.shape, c.m), c)))
    held: dict[Any, Any] = {}

    def weights(c: Case) -> Any:
        """Rotating weights; the random numbers are made once for each layout."""
        key = (c.format, c.shape, c.group)
        if key not in held:
            k, n = c.shape
            count = rotation(c.nbytes)
            if c.format == "bfloat16":
                held[key] = (
                    [
                        jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16)
                        for i in range(count)
                    ],
                    None,
                )
            else:
                held[key] = random_weights(c.layout, count, implementation_for())
        return held[key]

    def compile_one(c: Case) -> Any:
        if time.time() - start > args.seconds:
            return None
        planes, ready = weights(c)
        x = activations(c.m, c.shape[0], c.activations)
        floor = 3 + c.floor(*limits)
        if ready is None:
            # XLA's tuner is not reproducible: the best of three.
            dense = [lambda x, w: jnp.matmul(x, w) for _ in range(3)]
            return [compile_loop(f, x, planes, floor) for f in dense]
        module = module_of(ready, implementation_for())
        f = product(module, ready, ACTIVATIONS[c.activations], {})
        return [compile_loop(f, x, planes, floor)]

    dense: dict[Any, float] = {}
    rows: list[Row] = []
    for c, done in compiled(jobs, compile_one):
        if done is None:
            continue
        if isinstance(done, BaseException):
            print(f"{c}: {str(done).splitlines()[0][:200]}", flush=True)
            continue
        us = min(microseconds(loop) for loop in done)
        plain = dense.setdefault((c.shape, c.m), us)
        case = {
            "k": c.shape[0],
            "n": c.shape[1],
            "m": c.m,
            "format": c.format,
            "group": c.group or "",
            "activations": c.activations,
        }
        floor = c.floor(*limits)
        if c.format == "bfloat16":
            rows.append(Row(case, "time", us, "us", roofline=min(1, floor / us)))
            continue
        share = min(1.0, floor / us)
        rows.append(Row(case, "time", us, "us", plain, plain / us, share))
        print(
            f"{c.shape[0]}x{c.shape[1]} m={c.m} {c.format} {c.group or ''} "
            f"{c.activations}: {us:.2f} us, {plain / us:.2f}x of bf16 "
            f"({plain:.2f} us), {share:.0%}",
            flush=True,
        )
    write("packed_matmul", rows, device_tag=args.tag)


if __name__ == "__main__":
    main()
