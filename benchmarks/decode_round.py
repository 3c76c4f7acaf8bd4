"""Time of a round of decoding by width: layers as XLA compiles them, and `FusedRows`.

    python -m benchmarks.decode_round [--tag h100] [--widths 1 2 4 8 16] [--parts ...]

Parts: `rounds` times one compiled loop of rounds at batch 1 for each width, each way
and each context (tokens in the cache before a round), on random weights of SmolLM2's
shapes; `equality` compares the bits of logits that are read one by one with those that
are read together; `tiles` times each of the products with other tile sizes (30 weights
in turn, so that they come from memory), the first being those of the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models import DecoderConfig, FusedRows, LanguageModel
from benchmarks._results import RESULTS, Row, write
from benchmarks._speculative_runs import LOOPS, kernels_of_round
from benchmarks.decode_step import MODELS, random_params
from benchmarks.packed_matmul import LIMITS
from pallas_kernels import rows_attention, skinny_matmul
from pallas_kernels.rows_attention import _blocks as attention_blocks
from pallas_kernels.skinny_matmul import _blocks as product_blocks
from pallas_kernels.skinny_matmul._blocks import Blocks

ROUNDS = 64
TINY = DecoderConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=1,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      model: fused, without `rows`.
      params: its tree.
      slots: of the cache.
      widths, contexts: tokens of a round, and in the cache before it.
      loop: a name of `LOOPS`.
      threads: programs that are compiled at once.
      until: when no more is begun, by `time.perf_counter`.
    """

    model: LanguageModel
    params: Any
    slots: int
    widths: Sequence[int]
    contexts: Sequence[int]
    loop: str
    threads: int
    until: float
    implementation: str | None = None

    @property
    def ways(self) -> dict[str, LanguageModel]:
        """Models by what they are called in the results."""
        rows = FusedRows(self.implementation)
        return {
            "layers": self.model,
            "fused": dataclasses.replace(self.model, rows=rows),
        }


def loop_of(model: LanguageModel, width: int, slots: int) -> Callable[..., Any]:
    """Rounds that each read `width` tokens after `context` others."""

    def run(params: Any, context: jax.Array, rounds: jax.Array) -> jax.Array:
        def step(_: Any, carry: Any) -> Any:
            tokens, cache = carry
            positions = context + jnp.arange(width)[None]
            mask = jnp.arange(slots) <= positions[..., None]
            rows = model.read_rows(
                params,
                cache,
                tokens,
                positions=positions,
                slots=context[None],
                mask=mask[:, None],
            )
            logits = model.head_rows(params, rows.final)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), rows.cache

        start = jnp.zeros((1, width), jnp.int32), model.init_rows(1, slots)
        return jax.lax.fori_loop(0, rounds, step, start)[0]

    return run


def seconds(call: Callable[[int], Any], few: int, many: int) -> float:
    """Of one of the rounds that `call` makes; the better of three differences."""

    def once(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call(count))
        return time.perf_counter() - start

    once(few)
    short, long = (min(once(n) for _ in range(3)) for n in (few, many))
    return max(long - short, 0.0) / (many - few)


def rounds(setting: Setting) -> list[Row]:
    """Times by width, way and context."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    cases = list(itertools.product(setting.widths, setting.ways))

    def compiled(case: tuple[int, str]) -> Any:
        width, way = case
        run = jax.jit(loop_of(setting.ways[way], width, setting.slots))
        lowered = run.lower(setting.params, scalar, scalar)
        return lowered.compile(compiler_options=LOOPS[setting.loop])

    with ThreadPoolExecutor(setting.threads) as pool:
        programs = dict(zip(cases, pool.map(compiled, cases), strict=True))
    size = sum(x.nbytes for x in jax.tree.leaves(setting.params))
    device = jax.devices()[0].device_kind
    speed = next((v[0] for k, v in LIMITS.items() if k in device), None)
    rows: list[Row] = []
    base: dict[Any, float] = {}
    for context, (case, program) in itertools.product(
        setting.contexts, programs.items()
    ):
        if time.perf_counter() > setting.until:
            break
        width, way = case
        where = jnp.int32(context)
        counts = {n: jnp.int32(n) for n in (ROUNDS // 8, ROUNDS)}
        found = seconds(
            functools.partial(_call, program, setting.params, where, counts),
            *counts,
        )
        base.setdefault((context, width), found)
        about = {"part": "rounds", "context": context, "width": width, "way": way}
        first = base[context, width]
        ratio = first / found if found else 1.0
        floor = size / speed / found if speed and found else None
        rows.append(
            Row(about, "time of a round", found * 1e3, "ms", first * 1e3, ratio, floor)
        )
        kernels = kernels_of_round(program.as_text() or "")
        rows.append(Row(about, "kernels", kernels, "1"))
    return rows


def _call(program: Any, params: Any, where: Any, counts: Any, rounds: int) -> Any:
    return program(params, where, counts[rounds])


def equality(setting: Setting) -> list[Row]:
    """How many logits of a text differ by the width it is read with."""
    width = max(setting.widths)
    tokens = jax.random.randint(
        jax.random.key(0), (1, 4 * width), 0, setting.model.config.vocab_size
    )
    rows, logits = [], {}
    for way, model in setting.ways.items():
        for each in (1, width):
            logits[way, each] = _read(
                model, setting.params, tokens, each, setting.slots
            )
        a, b = logits[way, 1], logits[way, width]
        case = {"part": "equality", "way": way, "width": width}
        rows.append(Row(case, "logits that differ", float(jnp.mean(a != b)), "1"))
        rows.append(Row(case, "largest difference", float(jnp.abs(a - b).max()), "1"))
    a, b = logits["layers", 1], logits["fused", 1]
    case = {"part": "equality", "way": "fused against layers", "width": 1}
    rows.append(Row(case, "largest difference", float(jnp.abs(a - b).max()), "1"))
    rows.append(Row(case, "largest logit", float(jnp.abs(a).max()), "1"))
    return rows


@functools.partial(jax.jit, static_argnames=("model", "width", "slots"))
def _read(model: Any, params: Any, tokens: Any, width: int, slots: int) -> jax.Array:
    def group(cache: Any, given: Any) -> Any:
        at, some = given
        positions = at + jnp.arange(width)[None]
        mask = jnp.arange(slots) <= positions[..., None]
        rows = model.read_rows(
            params,
            cache,
            some[None],
            positions=positions,
            slots=at[None],
            mask=mask[:, None],
        )
        return rows.cache, model.head_rows(params, rows.final)[0]

    groups = tokens.reshape(-1, width)
    starts = jnp.arange(len(groups)) * width
    return jax.lax.scan(group, model.init_rows(1, slots), (starts, groups))[1].reshape(
        tokens.shape[1], -1
    )


def tiles(setting: Setting) -> list[Row]:
    """Times of single kernels by tile sizes."""
    c, width, dtype = setting.model.config, 8, setting.model.dtype
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "qkv": (c.hidden_size, q + 2 * kv, {"norm": True}),
        "output": (q, c.hidden_size, {"residual": True}),
        "gate_up": (c.hidden_size, 2 * c.intermediate_size, {"swiglu": True}),
        "down": (c.intermediate_size, c.hidden_size, {"residual": True}),
    }
    count = min(c.num_layers, 30)
    cases: list[tuple[str, Any, Any]] = []
    for name, (k, n, around) in shapes.items():
        swiglu = "swiglu" in around
        out = n // 2 if swiglu else n
        own = product_blocks.blocks(k, out)
        sizes = [own, *(b for b in PRODUCTS if b != own)]
        cases += [
            (name, b, _product(k, n, around, count, width, dtype, b)) for b in sizes
        ]
    heads = c.num_heads, c.num_kv_heads, c.head_dim
    plan = attention_blocks.blocks(setting.slots)
    context = max(setting.contexts)
    for b in [plan, *(b for b in ATTENTIONS if b != plan)]:
        run = _attention(heads, count, width, setting.slots, context, dtype, b)
        cases.append((f"attention at {context}", b, run))
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def compiled(case: Any) -> Any:
        _, _, (run, args) = case
        try:
            lowered = jax.jit(run).lower(*jax.eval_shape(lambda: args()), number)
            return lowered.compile(compiler_options=LOOPS[setting.loop])
        except jax.errors.JaxRuntimeError as e:  # more shared memory than there is
            return str(e).splitlines()[0]

    with ThreadPoolExecutor(setting.threads) as pool:
        programs = list(pool.map(compiled, cases))
    rows: list[Row] = []
    base: dict[str, float] = {}
    given: dict[str, Any] = {}
    counts = {n: jnp.int32(n) for n in (4, 24)}
    for (name, blocks, (_, args)), program in zip(cases, programs, strict=True):
        if isinstance(program, str) or time.perf_counter() > setting.until:
            continue
        if name not in given:
            given = {name: jax.block_until_ready(jax.jit(args)())}
        call = functools.partial(_product_call, program, given[name], counts)
        found = seconds(call, *counts) / count
        first = base.setdefault(name, found)
        case = {"part": "tiles", "kernel": name, **dataclasses.asdict(blocks)}
        ratio = first / found if found else 1.0
        rows.append(Row(case, "time", found * 1e6, "us", first * 1e6, ratio))
    return rows


def _product_call(program: Any, args: Any, counts: Any, rounds: int) -> Any:
    return program(*args, counts[rounds])


PRODUCTS = [Blocks(warps, tiles) for warps in (4, 8) for tiles in (1, 2)]
ATTENTIONS = [attention_blocks.Blocks(*b) for b in ((1, 1), (1, 3), (2, 1), (2, 3))]


def _product(
    k: int, n: int, around: Any, count: int, m: int, dtype: Any, blocks: Blocks
) -> Any:
    out = n // 2 if "swiglu" in around else n

    def args() -> Any:
        key = jax.random.key(0)
        w = [
            0.02 * jax.random.normal(jax.random.fold_in(key, i), (n, k), dtype)
            for i in range(count)
        ]
        return jnp.ones((m, k), dtype), w

    def run(x: jax.Array, w: Any, rounds: jax.Array) -> jax.Array:
        norm = None if "residual" in around else jnp.ones(k, dtype)

        def one(_: Any, y: jax.Array) -> jax.Array:
            for each in w:
                # What was computed before is the residual: one runs after the other.
                y = skinny_matmul(
                    x,
                    each,
                    transposed=True,
                    norm=norm,
                    swiglu="swiglu" in around,
                    residual=y,
                    tiles=blocks,
                )
            return y

        return jax.lax.fori_loop(0, rounds, one, jnp.zeros((m, out), dtype))

    return run, args


def _attention(
    heads: Any, count: int, t: int, slots: int, context: int, dtype: Any, blocks: Any
) -> Any:
    h, kv, d = heads

    def args() -> Any:
        cache = jnp.ones((1, kv, slots, d), dtype)
        return jnp.ones((1, t, (h + 2 * kv) * d), dtype), (cache, 2 * cache)

    def run(qkv: jax.Array, cache: Any, rounds: jax.Array) -> Any:
        turn = jnp.ones((1, t, d // 2), jnp.float32)
        positions = context - t + jnp.arange(t)
        mask = (jnp.arange(slots) <= positions[:, None])[None, None]
        at = jnp.asarray([context - t], jnp.int32)

        def one(_: Any, cache: Any) -> Any:
            for _ in range(count):
                cache = rows_attention(
                    *(qkv, turn, turn, mask, at, *cache), tiles=blocks
                )[1:]
            return cache

        return jax.lax.fori_loop(0, rounds, one, cache)

    return run, args


PARTS: dict[str, Callable[[Setting], list[Row]]] = {
    "rounds": rounds,
    "equality": equality,
    "tiles": tiles,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 768])
    parser.add_argument("--slots", type=int, default=960)
    parser.add_argument("--loop", choices=LOOPS, default="captured")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["rounds", "equality"]
    )
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=55.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds, on any device")
    args = parser.parse_args(arguments)
    config = TINY if args.smoke else MODELS[args.model]
    model = LanguageModel(config, dtype=jnp.bfloat16, fused=True)
    setting = Setting(
        *(model, random_params(model, "bfloat16"), args.slots),
        *(args.widths, args.contexts, args.loop, args.threads),
        time.perf_counter() + args.seconds,
    )
    rows: list[Row] = []
    for part in args.parts:
        start = time.perf_counter()
        rows += PARTS[part](setting)
        # What is measured is kept, whatever the next part does.
        path = write("decode_round", rows, device_tag=args.tag, directory=args.out)
        print(f"{part}: {time.perf_counter() - start:.0f} s, {path}", flush=True)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        case = " ".join(f"{k}={v}" for k, v in row.case.items())
        print(f"{case:64} {row.metric:20} {row.value:10.4g} {row.unit} {ratio}")


if __name__ == "__main__":
    main()
