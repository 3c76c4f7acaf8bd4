"""Milliseconds per token of a whole decoder at batch 1, packed against bfloat16.

    python -m benchmarks.decode_step [--tag h200] [--model 8b smollm2] [--formats ...]

Random weights; greedy decoding in one compiled loop over unrolled layers, 128 slots of
cache. Projections are fused (one launch for q, k, v, one for gate and up); packed
products quantize their activations to int8. The head stays bfloat16 unless the format
names another for it: `t2+int8`, or `t2+t2` for all linears in one format. `roofline` is
the share of the memory bandwidth that reading all weights once for each token takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

import angeljax as aj
from angeljax._graph import ONE_GRAPH
from angeljax._leaves import path_string
from angeljax._transposed import transposed
from angeljax.models import DecoderConfig, LanguageModel, decode_step
from benchmarks._results import Row, write
from benchmarks.packed_matmul import LIMITS
from pallas_kernels._devices import is_gpu

MODELS = {
    "8b": DecoderConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tied=False,
    ),
    "smollm2": DecoderConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tied=True,
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "t2": {"granularity": "channel"},
    "sherry": {"granularity": "channel"},
    "int4": {"granularity": "group", "group_size": 128},
    "int8": {},
}
FORMATS = ["t2", "t2+t2", "sherry", "sherry+sherry", "int4", "int4+int4", "int8"]
SLOTS, STEPS = 128, 64


def random_params(model: LanguageModel, kind: str) -> dict[str, Any]:
    """Parameters of a fused model; matrices packed in the format `kind`."""
    fmt, _, head = kind.partition("+")
    paths, treedef = jax.tree_util.tree_flatten_with_path(model.abstract(jnp.bfloat16))
    makers: dict[Any, Any] = {}
    leaves = []
    for i, (path, leaf) in enumerate(paths):
        name = path_string(path)
        what = "bfloat16"
        if name.startswith("lm_head/"):
            what = head or what
        elif name.endswith("_proj/kernel"):
            what = fmt
        matrix = name.endswith("/kernel")
        made = what, matrix, leaf.shape
        if made not in makers:
            makers[made] = _maker(what, matrix, leaf)
        leaves.append(makers[made](jax.random.key(i)))
    return jax.tree.unflatten(treedef, leaves)


def _maker(what: str, matrix: bool, leaf: Any) -> Any:
    def dense(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    if what == "bfloat16":
        # As `prepare_decoder` stores it.
        turned = matrix and is_gpu()
        return jax.jit(lambda key: transposed(dense(key)) if turned else dense(key))

    def packed(key: jax.Array) -> Any:
        q = aj.quantize(dense(key), format=what, **OPTIONS[what])
        return aj.prepare(q, activation="int8")

    return jax.jit(packed)


def milliseconds(model: LanguageModel, params: Any) -> tuple[float, dict[str, int]]:
    """Time of a token, the better of two ways to compile, and kernels in a step."""

    def run(params: Any) -> jax.Array:
        cache = model.init_cache(1, SLOTS)
        token = jnp.zeros((1,), jnp.int32)

        def step(_: Any, carry: Any) -> Any:
            cache, token = carry
            token, cache = decode_step(model, params, cache, token)
            # Wrap around instead of running over.
            length = jnp.where(cache.length >= SLOTS - 1, 0, cache.length)
            return dataclasses.replace(cache, length=length), token

        # A constant number: the host is not asked after each token.
        return jax.lax.fori_loop(0, STEPS, step, (cache, token))[1]

    lowered = jax.jit(run).lower(params)
    best, kernels = float("inf"), {}
    for options in (None, ONE_GRAPH):
        compiled = lowered.compile(compiler_options=options)
        kernels = count_kernels(compiled.as_text() or "")

        def once(calls: int, compiled: Any = compiled) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                out = compiled(params)
            jax.block_until_ready(out)
            return time.perf_counter() - start

        once(1)
        short, long = (min(once(n) for _ in range(3)) for n in (1, 3))
        best = min(best, (long - short) / 2 / STEPS * 1e3)
    return best, kernels


def count_kernels(text: str) -> dict[str, int]:
    """Operations of each kind in the body of the decode loop, from compiled HLO."""
    found: dict[str, int] = {}
    bodies = re.split(r"\n(?=\S)", text)
    names = re.findall(r"body=%?([\w.\-]+)", text)
    body = max(
        (b for b in bodies for n in names if b.lstrip("%").startswith(n)),
        key=len,
        default="",
    )
    # One step may lie in a computation of its own, called as one command buffer.
    inner = re.findall(r"call\(.*to_apply=%?([\w.\-]+)", body)
    texts = [body] + [b for b in bodies for n in inner if b.lstrip("%").startswith(n)]
    for line in "\n".join(texts).splitlines():
        match = re.search(r"= .*?\b(fusion|custom-call|copy|while|call)\(", line)
        if match:
            found[match[1]] = found.get(match[1], 0) + 1
    return found


def main() -> None:
    """Measures and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--model", nargs="*", default=list(MODELS))
    parser.add_argument(
        "--formats",
        nargs="*",
        default=["t2", "t2+t2", "sherry", "sherry+sherry", "int4", "int4+int4", "int8"],
    )
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    start = time.time()
    device = jax.devices()[0].device_kind
    bandwidth = next((v[0] for k, v in LIMITS.items() if k in device), 1e12)
    rows: list[Row] = []
    for name in args.model:
        model = LanguageModel(MODELS[name], dtype=jnp.bfloat16, fused=True)
        plain = None
        for kind in ["bfloat16", *args.formats]:
            if time.time() - start > args.seconds:
                break
            params = random_params(model, kind)
            # A table is read one row at a time, unless it is the head as well.
            table = 0 if model.config.tied else params["embed_tokens"]["embedding"].size
            size = sum(x.nbytes for x in jax.tree.leaves(params)) - 2 * table
            begin = time.time()
            ms, kernels = milliseconds(model, params)
            plain = ms if plain is None else plain
            floor = size / bandwidth * 1e3
            case = {"model": name, "format": kind, "kernels": sum(kernels.values())}
            rows.append(Row(case, "time", ms, "ms", plain, plain / ms, floor / ms))
            print(
                f"{name} {kind}: {ms:.3f} ms, {plain / ms:.2f}x, floor {floor:.3f} ms "
                f"({size / 1e9:.2f} GB), {kernels}, {time.time() - begin:.0f} s",
                flush=True,
            )
            del params
    write("decode_step", rows, device_tag=args.tag)


if __name__ == "__main__":
    main()
