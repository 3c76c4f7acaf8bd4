"""Mixture-of-experts products on a GPU against bfloat16 by XLA, in one run.

    python -m benchmarks.ragged_matmul [--tag h100] [--seconds 300] [--only NAME]

Random codes, random bfloat16 activations in and bfloat16 out; `a8` quantizes each row
in the product. Every token goes to `top_k` experts, all equally likely, drawn anew for
each product. The baseline is `jax.lax.ragged_dot` with bfloat16 weights, on the same
rows. `roofline` is the share of the device's memory bandwidth (packed bytes of the
experts that have rows, and activations) or of its peak, the larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._results import Row, write
from benchmarks.packed_matmul import LIMITS
from pallas_kernels import WeightLayout, implementation_for, ragged_matmul
from pallas_kernels._timing import CACHE, compile_loop, microseconds
from pallas_kernels.tune import random_weights

_BITS = {"t2": 2, "sherry": 1.25, "int4": 4, "bfloat16": 16}
_MOST = 32  # products in a round; more only take time to compile


@dataclasses.dataclass(frozen=True)
class Model:
    """One projection of the experts of a model."""

    k: int
    n: int
    experts: int
    top_k: int


MODELS = {
    "mixtral": Model(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Model(2048, 768, 128, 8),
}
# Tokens of a step; rows are `top_k` times as many.
DECODE = (1, 8, 64)
PREFILL_ROWS = 2048
FORMATS = [
    ("bfloat16", None, "bfloat16"),
    ("t2", None, "a8"),
    ("sherry", None, "a8"),
    ("int4", 128, "bfloat16"),
    ("int4", 128, "a8"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One product."""

    model: str
    tokens: int
    format: str
    group: int | None
    activations: str

    @property
    def shape(self) -> Model:
        """Sizes of the weights."""
        return MODELS[self.model]

    @property
    def rows(self) -> int:
        """Rows of the product."""
        return self.tokens * self.shape.top_k

    @property
    def nbytes(self) -> float:
        """Of the weight of one expert with its scales."""
        m = self.shape
        scale = 16 / self.group if self.group else 0
        return m.k * m.n * (_BITS[self.format] + scale) / 8

    def floor(self, busy: float, bandwidth: float, peak: float) -> float:
        """Microseconds that memory or arithmetic take at least."""
        m = self.shape
        rate = peak if self.activations == "bfloat16" else 2 * peak
        moved = busy * self.nbytes + 2 * self.rows * (m.k + m.n)
        return max(moved / bandwidth, 2 * self.rows * m.k * m.n / rate) * 1e6


def cases(names: list[str]) -> list[Case]:
    """All cases of some models."""
    return [
        Case(name, tokens, *kind)
        for name in names
        for tokens in (*DECODE, PREFILL_ROWS // MODELS[name].top_k)
        for kind in FORMATS
    ]


def routing(c: Case, seed: int) -> np.ndarray:
    """Rows of each expert when all are equally likely, int32 `[E]`."""
    rng = np.random.default_rng(seed)
    scores = rng.random((c.tokens, c.shape.experts))
    chosen = np.argsort(scores, axis=1)[:, : c.shape.top_k]
    return np.bincount(chosen.ravel(), minlength=c.shape.experts).astype(np.int32)


def weights(c: Case) -> tuple[list[Any], WeightLayout | None]:
    """Stacks of experts; together they do not fit in the cache."""
    m = c.shape
    count = max(2, int(CACHE / (c.nbytes * m.experts)) + 1)
    if c.format == "bfloat16":
        keys = [jax.random.key(i) for i in range(count)]
        shape = (m.experts, m.k, m.n)
        make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
        return [make(key) for key in keys], None
    layout = WeightLayout(format=c.format, k=m.k, n=m.n, group_size=c.group or m.k)
    stacks = []
    for i in range(count):
        one, ready = random_weights(
            layout, m.experts, implementation_for(), seed=i * m.experts
        )
        stacks.append(jax.tree.map(lambda *p: jnp.stack(p), *one))
    return stacks, ready


def product(c: Case, layout: WeightLayout | None) -> Any:
    """`(x, (weights, group_sizes)) -> y`."""
    if layout is None:
        return lambda x, w: jax.lax.ragged_dot(x, *w)
    activation = "int8" if c.activations == "a8" else None

    def run(x: jax.Array, w: Any) -> jax.Array:
        return ragged_matmul(x, w[0], layout, w[1], activation=activation)

    return run


def main() -> None:
    """Measures until the time is over and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS)
    args = parser.parse_args()
    start = time.time()
    kind = jax.devices()[0].device_kind
    limits = next((v for k, v in LIMITS.items() if k in kind), (1e12, 1e14))
    dense: dict[Any, float] = {}
    rows: list[Row] = []
    held: dict[Any, Any] = {}
    # One format after the other: only its weights are in memory. bfloat16 goes first.
    jobs = sorted(
        cases(args.only), key=lambda c: (c.model, FORMATS.index(_kind(c)), c.tokens)
    )
    for c in jobs:
        if time.time() - start > args.seconds:
            break
        key = (c.model, c.format, c.group)
        if key not in held:
            held.clear()
            held[key] = weights(c)
        stacks, layout = held[key]
        sizes = [routing(c, i) for i in range(_MOST)]
        busy = float(np.mean([np.count_nonzero(s) for s in sizes]))
        count = min(_MOST, max(len(stacks), int(CACHE / (busy * c.nbytes)) + 1))
        pairs = [(stacks[i % len(stacks)], jnp.asarray(sizes[i])) for i in range(count)]
        x = jax.random.normal(jax.random.key(9), (c.rows, c.shape.k), jnp.bfloat16)
        case = {
            "experts": c.model,
            "k": c.shape.k,
            "n": c.shape.n,
            "tokens": c.tokens,
            "rows": c.rows,
            "format": c.format,
            "group": c.group or "",
            "activations": c.activations,
        }
        try:
            floor = 5 + c.floor(busy, *limits)
            us = microseconds(compile_loop(product(c, layout), x, pairs, floor))
        except Exception as e:  # a baseline that does not fit must not end the run
            print(f"{case}: {str(e).splitlines()[0][:200]}", flush=True)
            continue
        share = min(1.0, c.floor(busy, *limits) / us)
        if layout is None:
            dense[c.model, c.tokens] = us
            rows.append(Row(case, "time", us, "us", roofline=share))
            print(f"{c.model} {c.tokens} tokens bfloat16: {us:.1f} us, {share:.0%}")
            continue
        plain = dense.get((c.model, c.tokens))
        ratio = None if plain is None else plain / us
        rows.append(Row(case, "time", us, "us", plain, ratio, share))
        print(
            f"{c.model} {c.tokens} tokens {c.format} {c.group or ''} {c.activations}: "
            f"{us:.1f} us, {ratio or float('nan'):.2f}x of bf16, {share:.0%}",
            flush=True,
        )
    write("ragged_matmul", rows, device_tag=args.tag)


def _kind(c: Case) -> tuple[str, int | None, str]:
    return c.format, c.group, c.activations


if __name__ == "__main__":
    main()
