"""Speculative decoding: is the text the same, and how much sooner is it there?

    python -m benchmarks.speculative PROMPTS.jsonl [--model FOLDER] [--tag h100]
        [--parts plain speed ...] [--eagle FOLDER] [--block FOLDER]
    python -m benchmarks.speculative --smoke

PROMPTS has lines {"category": ..., "turns": [first question, ...]}. Parts, each with a
time of its own (`--seconds speed=60`, compilation aside), after which it stops with
what it has; `--whole` limits all of it:

`plain`: a token of plain decoding, with the loop launched by the host and as one CUDA
graph; the better is used in what follows (`--loop` names one). The share of gaps is
1 - (time in which a kernel runs, by a profile) / (time without the profiler); where a
profile does not show what is in a graph, the kernels of the other loop count.
`width`: rounds that propose nothing, by their width.
`speed`: batch 1. Time of a token after the prompt, and speed-up over plain decoding by
the same code, the mean over prompts of the ratio of each; with the prompt read in it as
well; texts that differ from plain decoding, in rounds of one width and of any.
`batch`: the same for batch 8 of all tasks.
`equality`: float32 with exact products, greedy and sampled with the coupled rule: texts
that differ from plain decoding. Layers are scanned, which compiles sooner.
`large`: rounds by width for random weights of 8B shape, and the chance at which each
draft must be right for drafts that cost nothing to pay.
`profile`: the kernels that take most time in a round of each drafter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import angeljax as aj
from angeljax._spec_workflow import widths
from angeljax.models import (
    DecoderConfig,
    FusedRows,
    LanguageModel,
    load_model,
    prepare_decoder,
    stack_layers,
)
from angeljax.recipe import Recipe
from angeljax.speculative import (
    BlockDrafter,
    Drafter,
    EagleDrafter,
    EagleTree,
    Hybrid,
    NoDrafter,
    PromptLookup,
    Sampling,
    SelfDrafter,
    TokenRecycling,
    load_block,
    load_eagle,
    prepare_drafter,
    successors,
)
from benchmarks._results import RESULTS, Row, write
from benchmarks._speculative_runs import (
    LOOPS,
    Clock,
    Done,
    Programs,
    Way,
    widths_of,
)
from benchmarks.decode_step import MODELS, random_params
from benchmarks.packed_matmul import LIMITS

SECONDS = {
    "plain": 30.0,
    "width": 30.0,
    "speed": 60.0,
    "batch": 40.0,
    "equality": 60.0,
    "large": 50.0,
    "profile": 20.0,
}
TASKS = {"summarise_news": "summaries", "summarise_textbook": "summaries"}
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
SKIPPED = (10, 13, 16, 19, 22, 25)
Prompts = Sequence[tuple[str, list[int]]]


def read_prompts(
    path: Path, encode: Callable[[str], list[int]], length: int
) -> list[tuple[str, list[int]]]:
    """Tasks and tokens of the prompts that fit a length, tasks in turn."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tasks: dict[str, list[list[int]]] = defaultdict(list)
    for entry in (json.loads(line) for line in lines if line.strip()):
        ids = encode(entry["turns"][0])
        if 0 < len(ids) <= length:
            name = entry["category"]
            tasks[TASKS.get(name, name)].append(ids)
    if not tasks:
        raise ValueError(f"{path}: no prompt of at most {length} tokens")
    most = max(map(len, tasks.values()))
    return [
        (t, ids[i]) for i in range(most) for t, ids in tasks.items() if i < len(ids)
    ]


def first_of(prompts: Prompts, per_task: int) -> Prompts:
    """At most so many prompts of each task."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for task, ids in prompts:
        seen[task] += 1
        if seen[task] <= per_task:
            found.append((task, ids))
    return found


def drafters_of(
    model: Any,
    params: Any,
    *,
    eagle: Path | None = None,
    block: Path | None = None,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Drafter]:
    """All drafters; the target is as `load_model` gives it."""
    one, stack = model, params
    if not model.scan_layers:
        # A table is the same from scanned layers, which compile sooner.
        one, stack = dataclasses.replace(model, scan_layers=True), stack_layers(params)
    recycling = TokenRecycling(16, table=successors(one, stack))
    del stack
    lookup, long = (PromptLookup(count, min_ngram=2) for count in (7, 10))
    recipe = Recipe.from_dict(
        {"rules": [{"format": "int4", "granularity": "group", "group_size": 64}]}
    )
    layers = tuple(i for i in range(model.config.num_layers) if i not in SKIPPED)
    found: dict[str, Drafter] = {
        "prompt_lookup": lookup,
        "recycling": recycling,
        "hybrid": Hybrid(recycling, lookup),
        "hybrid_long": Hybrid(recycling, long),
        "int4_self": SelfDrafter(aj.compress(params, recipe, progress=False), 3),
        "layer_skip": SelfDrafter(num_tokens=3, layers=layers),
    }
    if eagle is not None:
        config, head = load_eagle(eagle, model.config, dtype=dtype)
        found["eagle"] = EagleDrafter(config, head, num_tokens=4)
        # Five branches have 15 queries for each head of the cache: one product of 16.
        tree, short = (
            EagleDrafter(config, head, growth=EagleTree(16, branches=5, levels=levels))
            for levels in (3, 2)
        )
        found |= {"eagle_tree": tree, "eagle_hybrid": Hybrid(tree, long)}
        found["eagle_hybrid_short"] = Hybrid(short, long)
        found["eagle_hybrid_flat"] = Hybrid(tree, long, flat_ngram=3)
    if block is not None:
        found["block"] = BlockDrafter(*load_block(block, dtype=dtype))
    return found


class Bench:
    """A model, its prompts, its drafters and their programs."""

    # Slots of at most 1024 let plain decoding use its fastest attention.
    length, new, slots = 768, 128, 960

    def __init__(self, args: Any) -> None:
        self.args, self.batch = args, 8
        self.loop = args.loop or "launched"
        self.prompts: Prompts = []
        self._small: Programs | None = None
        self.ways: dict[str, Way] = {}

    def load(self, dtype: Any, **options: Any) -> tuple[Any, Any, Any]:
        """Model, params and drafters; reads the prompts as well."""
        loaded = load_model(
            self.args.model, dtype=dtype, compute_dtype=dtype, **options
        )
        tokenizer = loaded.tokenizer
        assert tokenizer is not None
        if not self.prompts:
            self.prompts = read_prompts(
                self.args.prompts,
                lambda text: tokenizer.encode(tokenizer.chat(text)),
                self.length,
            )
        model, params = loaded.model, loaded.params
        given = {"eagle": self.args.eagle, "block": self.args.block, "dtype": dtype}
        found = drafters_of(model, params, **given)
        if (some := self.args.drafters) is not None:
            found = {name: found[name] for name in some}
        return model, params, found

    def eight(self) -> tuple[Any, Any]:
        """Random weights of 8B shape."""
        model = LanguageModel(MODELS["8b"], jnp.bfloat16, fused=True)
        return model, random_params(model, "bfloat16")

    @property
    def small(self) -> Programs:
        """bfloat16, as one would serve it."""
        if self._small is None:
            model, params, drafters = self.load(jnp.bfloat16)
            rows = FusedRows() if self.args.rows == "fused" else None
            ready, params = prepare_decoder(model, params, rows=rows)
            self.ways = {
                name: Way(prepare_drafter(model, drafter, rows=rows))
                for name, drafter in drafters.items()
            }
            self._small = Programs(
                *(ready, params),
                length=self.length,
                slots=self.slots,
                loop=self.loop,
                threads=self.args.threads,
            )
        return self._small


def plain(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """A token of plain decoding, and where its time goes."""
    with clock.paused():
        small = bench.small
    rows, best, busy = [], {}, 0.0
    (way,) = widths_of([1]).values()
    size = sum(x.nbytes for x in jax.tree.leaves(small.params))
    device = jax.devices()[0].device_kind
    speed = next((v[0] for k, v in LIMITS.items() if k in device), None)
    for loop in [bench.args.loop] if bench.args.loop else LOOPS:
        with clock.paused():
            small.compile({"plain": way}, 1, loop=loop)
        seconds = small.seconds_of_round("plain", way, 1, loop)
        best[loop] = seconds
        case = {"part": "plain", "loop": loop}
        floor = None if speed is None else size / speed / seconds
        rows.append(Row(case, "time of a token", seconds * 1e3, "ms", roofline=floor))
        kernels = small.kernels[loop, False, 1, Sampling(), "plain"]
        rows.append(Row(case, "kernels", kernels, "1"))
        if device != "cpu" and not bench.args.no_profile:
            found, count = small.profiled("plain", way, loop)
            # A profile may show a graph as one event.
            busy = found if 2 * count > kernels else busy
            if count:
                rows.append(Row(case, "kernels in the profile", count, "1"))
            if busy:
                gaps = max(0.0, 1 - busy / seconds)
                rows.append(Row(case, "time of kernels", busy * 1e3, "ms"))
                rows.append(Row(case, "share of gaps", gaps, "1"))
        if clock.over:
            break
    rows.append(Row({"part": "plain", "loop": ""}, "weights", size / 1e6, "MB"))
    bench.loop = small.loop = min(best, key=lambda loop: best[loop])
    yield rows


def width(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """Rounds of the small model by width."""
    for batch in (1, bench.batch):
        yield rounds(bench.small, "smollm2", bench.args.widths, batch, clock)


def rounds(
    programs: Programs, name: str, widths: Sequence[int], batch: int, clock: Clock
) -> list[Row]:
    """Times of rounds, and the chance of each draft at which they pay."""
    rows: list[Row] = []
    if clock.over:
        return rows
    with clock.paused():
        ways = programs.compile(widths_of({1, *widths}), batch)
    base = 0.0
    for label, way in ways.items():
        size = way.drafter.width
        seconds = programs.seconds_of_round(label, way, batch)
        base = base or seconds
        case = {"part": "width", "model": name, "width": size, "batch": batch}
        rows.append(Row(case, "time of a round", seconds * 1e3, "ms", base * 1e3))
        rows.append(Row(case, "kernels", programs.kernels_of(label, way, batch), "1"))
        if size > 1:
            even = break_even(seconds / base, size - 1)
            rows.append(Row(case, "break-even acceptance", even, "1"))
        if clock.over:
            break
    return rows


def break_even(cost: float, gamma: int) -> float:
    """The constant chance at which drafts that cost nothing just pay; 1 if never."""
    found = widths.break_even(cost, gamma)
    return 1.0 if found is None else found


def speed(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """Batch 1."""
    with clock.paused():
        some = first_of(bench.prompts, bench.args.per_task) if bench.small else []
    yield texts(bench, [[p] for p in some], bench.new, clock)


def profile(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """The kernels that take most time in a round of each drafter, in one text."""
    with clock.paused():
        small = bench.small
        ways = {"plain": widths_of([1])["plain"], **bench.ways}
        ways = small.compile(ways, 1)
    for label, way in ways.items():
        if clock.over:
            return
        small.run(label, way, [bench.prompts[0][1]], 4)
        found = small.dearest(label, way, bench.prompts[0][1], bench.new)
        case = {"part": "profile", "drafter": label}
        yield [
            Row({**case, "kernel": name}, "time in a round", seconds * 1e6, "us")
            for name, seconds in found.items()
        ]


def batch(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """Batches of prompts of all tasks."""
    some = list(bench.prompts)[: bench.args.equal_prompts] if bench.small else []
    size = bench.batch
    groups = [some[i : i + size] for i in range(0, len(some) - size + 1, size)]
    yield texts(bench, groups, bench.new // 2, clock)


def texts(bench: Bench, groups: Sequence[Prompts], new: int, clock: Clock) -> list[Row]:
    """Times and texts of all drafters, in turn for each group of prompts."""
    small, size = bench.small, len(groups[0])
    ways = {"plain": widths_of([1])["plain"], **bench.ways}
    # Rounds of one width, and the plain decoding that they must equal.
    for label, way in list(bench.ways.items()):
        if way.drafter.optional:
            ways[f"{label}_wide"] = Way(way.drafter, always_wide=True)
        if way.drafter.tree is None:
            ways |= same_width(way.drafter)
    with clock.paused():
        ways = small.compile(ways, size)
        for label, way in ways.items():
            small.run(label, way, [ids for _, ids in groups[0]], 4)
    done: dict[str, list[Done]] = defaultdict(list)
    for group in groups:
        for label, way in ways.items():
            ids = [ids for _, ids in group]
            done[label].append(small.run(label, way, ids, new))
        if clock.over:
            break
    tasks = [g[0][0] if size == 1 else "mixed" for g in groups]
    common = {"part": "speed", "loop": bench.loop, "batch": size, "new": new}
    rows = speed_rows(done, tasks, common)
    for label, way in ways.items():
        kernels = small.kernels_of(label, way, size)
        case = {"part": "speed", "drafter": label, "batch": size}
        rows.append(Row(case, "kernels", kernels, "1"))
        if label in bench.ways:
            # Rounds that may be narrow are compared in a program of their own.
            other = f"{label}_wide" if way.drafter.optional else label
            case = {"part": "equality", "drafter": label, "dtype": "bfloat16"}
            case |= {"sampling": "greedy", "batch": size}
            rows += differing(case, "fast", done["plain"], done[label])
            (same,) = same_width(way.drafter)
            if way.drafter.tree is None and {same, other} <= set(done):
                rows += differing(case, "same_width", done[same], done[other])
    return rows


def same_width(drafter: Drafter) -> dict[str, Way]:
    """Plain decoding that reads as much at once as the rounds of a drafter."""
    if not drafter.hidden:
        return widths_of([drafter.width])
    layers = "+".join(map(str, drafter.hidden))
    return {f"width {drafter.width}, layers {layers}": Way(NoDrafter.like(drafter))}


def speed_rows(
    done: dict[str, list[Done]], tasks: Sequence[str], common: dict[str, Any]
) -> list[Row]:
    """Means over prompts; texts of other lengths are compared by the token."""
    rows = []
    base = done["plain"]
    for label, found in done.items():
        for task in [*dict.fromkeys(tasks[: len(found)]), "all"]:
            at = [i for i in range(len(found)) if task in (tasks[i], "all")]
            each = [found[i].decode / found[i].longest for i in at]
            plain = [base[i].decode / base[i].longest for i in at]
            whole = [
                ((base[i].read + base[i].decode) / base[i].longest)
                / ((found[i].read + found[i].decode) / found[i].longest)
                for i in at
            ]
            ratio = statistics.fmean(b / a for a, b in zip(each, plain, strict=True))
            mine, theirs = statistics.fmean(each) * 1e3, statistics.fmean(plain) * 1e3
            case = {**common, "drafter": label, "task": task, "prompts": len(at)}
            tau = statistics.fmean(found[i].tau for i in at)
            read = statistics.median(found[i].read for i in at) * 1e3
            rows += [
                Row(case, "time of a token", mine, "ms", theirs, ratio),
                Row(case, "tau", tau, "1"),
                Row(case, "speed-up with the prompt", statistics.fmean(whole), "1"),
                Row(case, "time of the prompt", read, "ms"),
            ]
    return rows


def differing(
    case: dict[str, Any], exact: str, first: Sequence[Done], second: Sequence[Done]
) -> list[Row]:
    """How many rows have another text, of those that both made."""
    pairs = [
        (a, b)
        for one, two in zip(first, second, strict=False)
        for a, b in zip(one.tokens, two.tokens, strict=True)
    ]
    case = {**case, "exact": exact, "prompts": len(pairs)}
    return [Row(case, "texts that differ", sum(a != b for a, b in pairs), "1")]


def equality(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """float32 with exact products."""
    with clock.paused(), jax.default_matmul_precision("highest"):
        model, params, drafters = bench.load(jnp.float32, scan_layers=True)
    programs = Programs(
        *(model, params),
        length=bench.length,
        slots=bench.slots,
        loop=bench.loop,
        precision="highest",
        tuned=False,
        threads=bench.args.threads,
    )
    ways = {"plain": widths_of([1])["plain"]}
    ways |= {name: Way(drafter) for name, drafter in drafters.items()}
    ids = [ids for _, ids in bench.prompts][: bench.args.equal_prompts]
    samplings = {"greedy": Sampling(), "coupled": Sampling(temperature=0.8, seed=1)}
    new = min(bench.args.equal_new, bench.new)
    samplings = {name: samplings[name] for name in bench.args.samplings}
    sizes = bench.args.batches or (bench.batch, 1)
    left = len(sizes) * len(samplings)
    for size in sizes:
        for name, sampling in samplings.items():
            if clock.over:
                return
            with clock.paused():
                ways = programs.compile(ways, size, sampling)
            # Each has its share of the time, and what others left of theirs.
            share = (clock.seconds - clock.spent) / left
            own, left = Clock(share, clock.until), left - 1
            done: dict[str, list[Done]] = defaultdict(list)
            for i in range(0, len(ids) - size + 1, size):
                for label, way in ways.items():
                    group = ids[i : i + size]
                    found = programs.run(label, way, group, new, sampling)
                    done[label].append(found)
                if own.over:
                    break
            rows: list[Row] = []
            for label in [label for label in ways if label != "plain"]:
                case: dict[str, Any] = {"part": "equality", "drafter": label}
                case |= {"dtype": "float32", "sampling": name, "batch": size}
                rows += differing(case, "fast", done["plain"], done[label])
            yield rows


def large(bench: Bench, clock: Clock) -> Iterator[list[Row]]:
    """Random weights of 8B shape."""
    programs = Programs(
        *bench.eight(),
        length=128,
        slots=256,
        loop=bench.loop,
        threads=bench.args.threads,
    )
    yield rounds(programs, "8b", bench.args.widths, 1, clock)


TINY = DecoderConfig(
    model_type="llama",
    vocab_size=256,
    hidden_size=32,
    num_layers=1,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
)
PARTS: dict[str, Callable[[Bench, Clock], Iterator[list[Row]]]] = {
    "plain": plain,
    "width": width,
    "speed": speed,
    "batch": batch,
    "equality": equality,
    "large": large,
    "profile": profile,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prompts", nargs="?", type=Path)
    parser.add_argument("--model", default="smollm2", help="as `load_model` takes one")
    parser.add_argument("--tag", default="cpu")
    usual = [part for part in PARTS if part != "profile"]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual)
    parser.add_argument("--seconds", nargs="*", default=[], metavar="PART=SECONDS")
    parser.add_argument(
        "--whole", type=float, default=float("inf"), help="seconds, all included"
    )
    parser.add_argument("--loop", choices=LOOPS, help="default the faster of both")
    parser.add_argument("--per-task", type=int, default=8, help="prompts of `speed`")
    parser.add_argument("--equal-prompts", type=int, default=200)
    samplings = ["greedy", "coupled"]
    parser.add_argument(
        "--samplings",
        nargs="+",
        choices=samplings,
        default=samplings,
        help="of `equality`",
    )
    parser.add_argument("--batches", nargs="*", type=int, help="of `equality`")
    parser.add_argument("--drafters", nargs="*", help="default all that there are")
    parser.add_argument("--equal-new", type=int, default=64, help="tokens of each")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=4, help="compile at once")
    parser.add_argument("--eagle", type=Path, help="folder of a trained head")
    parser.add_argument("--block", type=Path, help="folder of a trained block drafter")
    parser.add_argument("--rows", choices=["layers", "fused"], default="layers")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds, random weights")
    args = parser.parse_args(arguments)
    if args.prompts is None and not args.smoke:
        raise SystemExit("name a file of prompts, or use --smoke")
    bench = Smoke(args) if args.smoke else Bench(args)
    given = dict(pair.split("=") for pair in args.seconds)
    rows: list[Row] = []
    failed: list[str] = []
    until = time.perf_counter() + args.whole
    for part in args.parts:
        clock = Clock(float(given.get(part, SECONDS[part])), until)
        try:
            for found in PARTS[part](bench, clock):
                if part not in ("equality", "large"):
                    more = {"rows": args.rows}
                    found = [
                        dataclasses.replace(row, case={**row.case, **more})
                        for row in found
                    ]
                for row in found:
                    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
                    told = f"{row.metric} {row.value:.4g} {row.unit} {ratio}"
                    print(dict(row.case), told)
                rows += found
                # What is measured is kept, whatever comes next.
                path = write(
                    "speculative", rows, device_tag=args.tag, directory=args.out
                )
                print(f"{part}: {clock.spent:.0f} s, {path}", flush=True)
        except Exception:
            # Time on a device is dear: the other parts are measured all the same.
            failed.append(part)
            traceback.print_exc()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


class Smoke(Bench):
    """The same on a tiny model and made-up prompts."""

    length, new, slots = 8, 8, 96

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.prompts = [("chat", [5, 6, 7, 5, 6]), ("code", [9, 9, 8])]
        self.batch = 2

    def load(self, dtype: Any, **options: Any) -> tuple[Any, Any, Any]:
        model = LanguageModel(TINY, **options)
        params = model.init(jax.random.key(0))
        return model, params, {"prompt_lookup": PromptLookup(3)}

    def eight(self) -> tuple[Any, Any]:
        return self.load(jnp.float32)[:2]


if __name__ == "__main__":
    main()
