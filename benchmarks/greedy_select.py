"""Greedy selection of tokens: the Gram matrix, the choices, and both together.

    python -m benchmarks.greedy_select [--tag h100] [--cases 0 1] [--tune] [--smoke]

Embeddings are clusters around a common direction and importance is uniform. `what` of
a row names what is timed: "gram", "select <name>" (from a Gram matrix that is there, by
one implementation), "both <dtype>" (the public function), or PyTorch's loop: the matrix
in float32, then topk, `.tolist()` and a maximum for every token, as AngelSlim does.
`roofline` is the larger of one bfloat16 product at the peak of the tensor cores and the
bytes of all chosen rows at the bandwidth of the memory, over the time. Beside times:
errors of the matrix, and how much of the exact choice "fast" cosines and bfloat16
embeddings give (Jaccard).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks._attention_timing import PEAK
from benchmarks._results import Row, write
from pallas_kernels import _timing, greedy_select
from pallas_kernels._devices import implementation_for
from pallas_kernels._weights import KernelError
from pallas_kernels.greedy_select import _gram

BANDWIDTH = 3.35e12  # bytes/s of an H100's memory
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """N tokens of D channels, of which K are chosen, for B images."""

    n: int
    d: int
    k: int
    b: int = 1

    def fields(self, what: str) -> dict[str, Any]:
        """What names a row."""
        return {
            "tokens": self.n,
            "dim": self.d,
            "select": self.k,
            "batch": self.b,
            "what": what,
        }

    @property
    def product(self) -> float:
        """Seconds of one bfloat16 product at the peak of the tensor cores."""
        return 2.0 * self.b * self.n * self.n * self.d / PEAK

    @property
    def row_bytes(self) -> float:
        """Bytes of all rows of the matrix that belong to a choice."""
        return 4.0 * self.b * self.n * self.k

    @property
    def guess(self) -> float:
        """Microseconds of the choices, roughly."""
        return 5 + 0.5 * self.k


CASES = [
    Case(2691, 3584, 672),
    Case(576, 1024, 64),
    Case(2691, 3584, 672, 8),
    Case(576, 1024, 144),
    Case(1024, 2048, 256),
    Case(4096, 3584, 1024),
    Case(576, 1024, 64, 32),
]
SMOKE = [Case(96, 32, 12), Case(64, 32, 8, 2)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def embeddings(key: jax.Array, c: Case, dtype: str) -> jax.Array:
    """Clusters around a common direction, `[B, N, D]`."""
    keys = jax.random.split(key, 4)
    centres = jax.random.normal(keys[0], (c.b, max(c.n // 20, 1), c.d))
    which = jax.random.randint(keys[1], (c.b, c.n), 0, centres.shape[1])
    own = jnp.take_along_axis(centres, which[..., None], axis=1)
    noise = 0.7 * jax.random.normal(keys[2], (c.b, c.n, c.d))
    common = 0.7 * jax.random.normal(keys[3], (c.b, 1, c.d))
    return (own + noise + common).astype(dtype)


def importance_of(c: Case) -> jax.Array:
    """Uniform importance `[B, N]`."""
    return jax.random.uniform(jax.random.key(1), (c.b, c.n))


def timed(f: Callable[..., jax.Array], c: Case, inputs: list[Any], us: float) -> float:
    """Microseconds of `f(importance, x)`, where x is one input after the other."""

    def bound(v: jax.Array, x: jax.Array) -> jax.Array:
        # Else what needs only x, which the loop never changes, is computed before it.
        return f(*lax.optimization_barrier((v, x)))

    loop = _timing.compile_loop(bound, importance_of(c), inputs, guess=us)
    return _timing.microseconds(loop)


def several(c: Case, bytes_each: float, make: Callable[[jax.Array], Any]) -> list[Any]:
    """Different inputs, too many for the cache."""
    count = min(_timing.rotation(bytes_each), 6)
    return [make(key) for key in jax.random.split(jax.random.key(2), count)]


def say(c: Case, what: str, us: float, share: float | None) -> None:
    """One line for a measurement."""
    part = "" if share is None else f", {100 * share:.1f} % of the roofline"
    print(f"{c.n} x {c.d} -> {c.k}, B={c.b}: {what}: {us:.1f} us{part}", flush=True)


def whole(c: Case) -> Iterator[Row]:
    """The matrix, and the public function, for both dtypes."""
    ideal = max(c.product, c.row_bytes / BANDWIDTH)
    for dtype in DTYPES:
        bytes_each = c.b * c.n * c.d * jnp.dtype(dtype).itemsize
        inputs = several(c, bytes_each, functools.partial(embeddings, c=c, dtype=dtype))

        def gram(v: jax.Array, x: jax.Array) -> jax.Array:
            rest = _gram.padding(c.n)
            x = jnp.pad(x, ((0, 0), (0, rest), (0, 0)))
            return _gram.cosine(x, "highest")

        def both(v: jax.Array, x: jax.Array) -> jax.Array:
            return greedy_select(x, v, c.k)

        product = c.product * 1e6
        us = timed(gram, c, inputs, 10 + 4 * product)
        say(c, f"gram {dtype}", us, product / us)
        yield Row(c.fields(f"gram {dtype}"), "time", us, "us", roofline=product / us)
        us = timed(both, c, inputs, 10 + 4 * product + c.guess)
        say(c, f"both {dtype}", us, ideal * 1e6 / us)
        yield Row(
            c.fields(f"both {dtype}"), "time", us, "us", roofline=ideal * 1e6 / us
        )


def choices(c: Case, names: list[str]) -> Iterator[Row]:
    """Selection from a matrix that is there, by each implementation."""
    ideal = c.row_bytes / BANDWIDTH * 1e6
    grams = _grams(c)
    rest = _gram.padding(c.n)
    mask = jnp.broadcast_to(jnp.arange(c.n + rest) < c.n, (c.b, c.n + rest))
    base = None
    for name in names:

        def select(v: jax.Array, gram: jax.Array, name: str = name) -> jax.Array:
            v = jnp.pad(v, ((0, 0), (0, rest)))
            return greedy_select(
                None, v, c.k, gram=gram, mask=mask, implementation=name
            )

        try:
            us = timed(select, c, grams, c.guess)
        except KernelError as e:
            print(f"{name}: {e}", flush=True)
            continue
        base = base or us
        say(c, f"select {name}", us, ideal / us)
        yield Row(
            c.fields(f"select {name}"), "time", us, "us", base, base / us, ideal / us
        )
        yield Row(c.fields(f"select {name}"), "step", us / c.k, "us")
    yield Row(c.fields("rows"), "bytes", c.row_bytes, "B")


def _grams(c: Case) -> list[jax.Array]:
    """Matrices with the padding that the public function gives them."""
    size = c.n + _gram.padding(c.n)
    padded = dataclasses.replace(c, n=size)
    cosine = jax.jit(_gram.cosine, static_argnums=1)
    xs = several(
        c, 4 * c.b * size * size, lambda key: embeddings(key, padded, "bfloat16")
    )
    return [cosine(x, "highest") for x in xs]


def tuning(c: Case) -> Iterator[Row]:
    """Warps of the Hopper kernel and how it reads ahead."""
    from pallas_kernels.greedy_select import _terms, mosaic_gpu, triton

    settings = _terms.Settings(c.k, "mmr", 0.5, 1)
    size = c.n + _gram.padding(c.n)
    padded = dataclasses.replace(c, n=size)
    grams = _grams(c)
    valid, limit = jnp.ones((c.b, size), bool), jnp.full(c.b, c.k, jnp.int32)
    variants: dict[str, Callable[..., jax.Array]] = {}
    for warps in (4, 8, 16):
        for early in ("", "copy", "prefetch"):
            name = f"mosaic_gpu, {warps} warps, early={early!r}"
            variants[name] = functools.partial(
                mosaic_gpu.select, warps=warps, early=early
            )
        variants[f"triton, {warps} warps"] = functools.partial(
            triton.select, warps=warps
        )
    for name, run in variants.items():

        def select(v: jax.Array, gram: jax.Array, run: Any = run) -> jax.Array:
            return run(gram, v, valid, limit, settings)

        try:
            us = timed(select, padded, grams, c.guess)
        except Exception as e:  # one variant must not end the run
            print(f"{name}: {str(e).splitlines()[0][:200]}", flush=True)
            continue
        say(c, name, us, None)
        yield Row(c.fields(name), "time", us, "us")


def quality(c: Case) -> Iterator[Row]:
    """Errors of the matrix, and overlap of choices with the exact ones."""
    one = dataclasses.replace(c, b=1)
    x = embeddings(jax.random.key(3), one, "float32")
    v = importance_of(one)
    rows = np.asarray(x[0], np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8
    want = rows[:256] @ rows.T
    cosine = jax.jit(_gram.cosine, static_argnums=1)
    for precision in ("highest", "fast"):
        got = np.asarray(cosine(x, precision)[0, :256], np.float64)
        error = float(np.abs(got - want).max())
        print(f"{c.n} x {c.d}: largest error of {precision}: {error:.2e}", flush=True)
        yield Row(c.fields(f"gram {precision}"), "max_error", error, "1")
    exact = jnp.asarray(np.float32(rows @ rows.T))[None]
    wanted = set(np.asarray(greedy_select(None, v, c.k, gram=exact))[0].tolist())
    found = {
        "highest": greedy_select(x, v, c.k),
        "fast": greedy_select(x, v, c.k, precision="fast"),
        "bfloat16 embeddings": greedy_select(x.astype(jnp.bfloat16), v, c.k),
    }
    for name, order in found.items():
        chosen = set(np.asarray(order)[0].tolist())
        share = len(wanted & chosen) / len(wanted | chosen)
        print(f"{c.n} -> {c.k}: {name}: Jaccard {share:.4f}", flush=True)
        yield Row(c.fields(f"select {name}"), "jaccard", share, "1")


def torch_loop(c: Case, ours: float | None) -> Iterator[Row]:
    """PyTorch, eagerly, one transfer to the host for every choice."""
    try:
        import torch
    except ImportError as e:
        print(f"PyTorch: {e}", flush=True)
        return
    if not torch.cuda.is_available() or c.b != 1:
        return
    x = torch.from_numpy(np.array(embeddings(jax.random.key(3), c, "float32")[0]))
    v = torch.from_numpy(np.array(importance_of(c)[0])).cuda()
    x = x.cuda()

    def run() -> list[int]:
        unit = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
        similar = unit @ unit.T
        near = torch.full((c.n,), -2.0, device=x.device)
        taken = torch.zeros(c.n, dtype=torch.bool, device=x.device)
        order: list[int] = []
        while len(order) < c.k:
            score = 0.5 * v - 0.5 * near if order else v
            score = score.masked_fill(taken, float("-inf"))
            best = torch.topk(score, 1).indices.tolist()
            order += best
            taken[best] = True
            near = torch.maximum(near, similar[:, best].max(dim=1).values)
        return order

    run()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    us = best * 1e6
    say(c, f"PyTorch {torch.__version__}", us, None)
    ratio = None if ours is None else ours / us
    name = f"PyTorch {torch.__version__} loop"
    yield Row(c.fields(name), "time", us, "us", ours, ratio)


def table(rows: list[Row]) -> None:
    """All times in one table."""
    print(f"\n{'tokens':>7} {'dim':>5} {'select':>6} {'batch':>5} {'us':>10}  what")
    for row in rows:
        if row.metric == "time":
            f = row.case
            print(
                f"{f['tokens']:>7} {f['dim']:>5} {f['select']:>6} {f['batch']:>5} "
                f"{row.value:>10.1f}  {f['what']}"
            )


def main() -> None:
    """Measures, the most important first, and writes what there is after each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--tune", action="store_true", help="variants of kernels only")
    parser.add_argument("--smoke", action="store_true", help="tiny, writes nothing")
    parser.add_argument("--seconds", type=float, default=170.0, help="stop after them")
    args = parser.parse_args()
    cases = SMOKE if args.smoke else CASES
    if args.cases:
        cases = [cases[i] for i in args.cases]
    best = implementation_for()
    names = list(dict.fromkeys([best, *(["triton"] if best != "xla" else []), "xla"]))
    rows: list[Row] = []
    start = time.perf_counter()

    def ours(c: Case) -> float | None:
        found = [
            r.value
            for r in rows
            if r.case == c.fields("both float32") and r.metric == "time"
        ]
        return found[0] if found else None

    parts: list[Callable[[Case], Iterator[Row]]] = [
        whole,
        functools.partial(choices, names=names),
        lambda c: torch_loop(c, ours(c)),
        quality,
        functools.partial(choices, names=["reference"]),
    ]
    if args.tune:
        parts = [tuning]
    claim = "greedy_select_tuning" if args.tune else "greedy_select"
    for part in parts:
        for c in cases:
            if time.perf_counter() - start > args.seconds:
                print("no time left for the rest", flush=True)
                break
            rows += part(c)
            if not args.smoke and rows:
                write(claim, rows, device_tag=args.tag)
    table(rows)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
