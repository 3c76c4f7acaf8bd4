"""How long GPTQ takes to compile and to run, by width.

    python -m benchmarks.gptq_time --shapes 512x512,4096x4096,4096x14336 --tag h100

With `--model` and `--calibration` also a whole model layer by layer, 128 x 2048 tokens,
in this process for the first time and again. Symmetric int4 in groups of 128.
Compilation is measured apart from the run, and the run is the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from angeljax.algorithms import GPTQOptions, gptq
from angeljax.formats import make_spec
from angeljax.models import load_model
from angeljax.train import load_tokens
from benchmarks._results import RESULTS, Row, write


def measure(k: int, n: int, options: GPTQOptions, repeats: int) -> list[Row]:
    """Seconds to compile and to run one weight `[k, n]`."""
    spec = make_spec((k, n), jnp.float32, format="int4", group_size=128)

    @jax.jit
    def made(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        a, b = jax.random.split(key)
        # Correlated inputs: neighbours share a third of their variance.
        x = jax.random.normal(a, (2 * k, k + 2))
        x = x[:, :-2] + 0.5 * x[:, 1:-1] + 0.5 * x[:, 2:]
        hessian = jnp.matmul(x.T, x, precision="highest")
        found = {"hessian": hessian, "count": jnp.float32(2 * k)}
        return jax.random.normal(b, (k, n)), found

    w, found = jax.block_until_ready(made(jax.random.key(0)))
    began = time.perf_counter()
    run = jax.jit(gptq, static_argnums=(1, 3)).lower(w, spec, found, options).compile()
    compile_time = time.perf_counter() - began
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(w, found))
        times.append(time.perf_counter() - began)
    groups = "static" if options.static_groups else "on the way"
    case = {"inputs": k, "outputs": n, "scales": groups, "act order": options.act_order}
    print(case, f"compile {compile_time:.2f} s, run {min(times):.3f} s", flush=True)
    return [
        Row(case, "compile_time", compile_time, "s"),
        Row(case, "run_time", min(times), "s"),
    ]


def whole(source: str, calibration: list[str], rows: int) -> list[Row]:
    """Seconds to quantize a model, compilation included and then without."""
    loaded = load_model(source, dtype=jnp.float32, compute_dtype=jnp.float32)
    ids = load_tokens(calibration, None)[: rows * 2048].reshape(rows, 2048)
    rule = aj.Rule(format="int4", group_size=128, algorithm="gptq")
    recipe, found = aj.Recipe(rules=[rule]), []
    tokens = ids.astype(np.int32)
    for metric in ("first_time", "again_time"):
        began = time.perf_counter()
        tree = aj.compress_sequential(
            loaded.model, loaded.params, recipe, tokens, progress=False
        )
        jax.block_until_ready(jax.tree.leaves(tree))
        seconds = time.perf_counter() - began
        case = {"model": "SmolLM2-135M", "tokens": tokens.size}
        found.append(Row(case, metric, seconds, "s"))
        print(case, metric, f"{seconds:.1f} s", flush=True)
    return found


def main() -> None:
    """Measures every shape and writes once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = "512x512,2048x2048,4096x4096,4096x14336,14336x4096"
    parser.add_argument("--shapes", default=shapes)
    parser.add_argument("--model", help="also the whole of this model")
    parser.add_argument("--calibration", nargs="*", default=[], help="token files")
    parser.add_argument("--rows", type=int, default=128, help="of 2048 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tag", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    if args.model:
        rows += whole(args.model, args.calibration, args.rows)
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for static, act_order in ((False, False), (True, False), (True, True)):
            options = GPTQOptions(act_order=act_order, static_groups=static)
            rows += measure(k, n, options, args.repeats)
    write("gptq_time", rows, device_tag=args.tag, directory=args.out)


if __name__ == "__main__":
    main()
