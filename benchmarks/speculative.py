"""Speculative decoding: is the text the same, and how much sooner is it there?

    python -m benchmarks.speculative PROMPTS.jsonl [--tag h100] [--parts equality speed]
    python -m benchmarks.speculative --smoke

PROMPTS has lines {"category": ..., "turns": [first question, ...]}. Parts:
`equality` counts texts that differ from plain decoding: float32; bfloat16 with rounds
of one width, and fast ones; `speed` times whole generations in bfloat16, by batches,
against plain decoding by the same code (`autoregressive`, the baseline of all
ratios) and by `models.generate` ("plain decode"); `width` times rounds by their width;
`large` does so for random weights of 8B shape. Weights are fused and stored as
`prepare_decoder` does. A generation is one call; its prompt is read in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models import LanguageModel, load_model, prepare_decoder
from angeljax.models import generate as plain_generate
from angeljax.speculative import (
    Drafter,
    Generated,
    Hybrid,
    Profile,
    PromptLookup,
    TokenRecycling,
    autoregressive,
    divergences,
    generate,
    profile_target,
    successors,
)
from angeljax.speculative._check import bucket
from benchmarks._results import RESULTS, Row, write
from benchmarks.decode_step import MODELS, random_params

PARTS = ("equality", "speed", "width", "large")
# Equality is counted on longer prompts as well.
LENGTH, EQUAL_LENGTH, NEW = 512, 1024, 128
WIDTHS = (1, 2, 4, 8, 15, 16, 32)


def read_prompts(
    path: Path, encode: Callable[[str], list[int]], length: int, limit: int | None
) -> list[tuple[str, list[int]]]:
    """Categories and tokens of prompts that fit one length, evenly over the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    found = [(e["category"], encode(e["turns"][0])) for e in entries]
    found = [(name, ids) for name, ids in found if 0 < len(ids) <= length]
    if not found:
        raise ValueError(f"{path}: no prompt of at most {length} tokens")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found


def padded(prompts: Sequence[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """One array for all, so that all share a program."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens, np.asarray([len(p) for p in prompts], np.int32)


def run_one(
    model: Any, params: Any, ids: np.ndarray, size: np.ndarray, how: Any, new: int
) -> Generated:
    """A batch of padded prompts; `how` is a drafter, or None for plain decoding."""
    # Slots by the padded length: prompts of all lengths share a program.
    options: dict[str, Any] = {"max_new_tokens": new, "slots": ids.shape[1] + new + 64}
    if how is None:
        return autoregressive(model, params, ids, size, **options)
    return generate(model, params, ids, size, drafter=how, **options)


def equality(
    model: Any,
    params: Any,
    prompts: Sequence[list[int]],
    drafters: dict[str, Drafter],
    *,
    name: str,
    exact: str,
    length: int,
    new: int,
    batch: int,
) -> list[Row]:
    """How many texts differ from plain decoding, and the largest gap where they do."""
    out = []
    for label, drafter in drafters.items():
        if exact == "same_width" and drafter.tree is not None:
            continue
        differ, gap, count = 0, 0.0, 0
        for first in range(0, len(prompts), batch):
            # The last batch is as large as the others; what it repeats is not counted.
            at = min(first, len(prompts) - batch)
            ids, size = padded(prompts[at : at + batch], length)
            width = drafter.width if exact == "same_width" else 1
            options: dict[str, Any] = {
                "max_new_tokens": new,
                "slots": length + new + 64,
            }
            plain = autoregressive(model, params, ids, size, width=width, **options)
            fast = generate(
                model, params, ids, size, drafter=drafter, exact=exact, **options
            )
            found = divergences(model, params, ids, plain, fast, size)
            found = [d for d in found if at + d.row >= first]
            differ += len(found)
            gap = max([gap, *(d.gap for d in found)])
            count += at + batch - first
        case = {"drafter": label, "dtype": name, "exact": exact, "prompts": count}
        out.append(Row(case, "texts that differ", differ, "1"))
        out.append(Row(case, "largest gap", min(gap, 1e9), "logits"))
    return out


def speed(
    model: Any,
    params: Any,
    prompts: Sequence[tuple[str, list[int]]],
    drafters: dict[str, Drafter],
    *,
    length: int,
    new: int,
    batch: int,
) -> list[Row]:
    """Milliseconds of a token, tau and speed-up of each drafter and category."""
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    groups = [g for g in groups if len(g) == batch]
    ways: dict[str, Any] = {"autoregressive": None, **drafters}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    taus: dict[tuple[str, str], list[float]] = defaultdict(list)
    gains: dict[tuple[str, str], list[float]] = defaultdict(list)
    compiled: set[int] = set()
    for group in groups:
        task = group[0][0] if len({t for t, _ in group}) == 1 else "mixed"
        ids, size = padded([p for _, p in group], length)
        # Prompts of one bucket share the program that reads them.
        fresh = bucket(int(size.max())) not in compiled
        compiled.add(bucket(int(size.max())))
        base = 0.0
        for label, how in ways.items():
            if fresh:
                run_one(model, params, ids, size, how, new)
            start = time.perf_counter()
            done = run_one(model, params, ids, size, how, new)
            jax.block_until_ready(done.tokens)
            each = (time.perf_counter() - start) / max(int(done.lengths.max()), 1)
            base = each if how is None else base
            for key in ((label, task), (label, "all")):
                seconds[key].append(each)
                taus[key].append(done.tau)
                gains[key].append(base / each)
    rows = []
    for (label, task), values in seconds.items():
        case = {"drafter": label, "task": task, "batch": batch, "prompts": len(values)}
        mine, plain = (
            statistics.fmean(seconds[key, task]) * 1e3
            for key in (label, "autoregressive")
        )
        ratio = statistics.fmean(gains[label, task])
        rows.append(Row(case, "time of a token", mine, "ms", plain, ratio))
        rows.append(Row(case, "tau", statistics.fmean(taus[label, task]), "1"))
    return rows


def plain_decode(model: LanguageModel, params: Any, length: int, new: int) -> Row:
    """Milliseconds of a token of the library's own plain decoding."""
    ids = jnp.ones((1, length), jnp.int32)

    def once(count: int) -> float:
        start = time.perf_counter()
        out = plain_generate(model, params, ids, max_new_tokens=count, eos_ids=())
        jax.block_until_ready(out.tokens)
        return time.perf_counter() - start

    for count in (new, new // 2):
        once(count)
    long, short = (min(once(n) for _ in range(3)) for n in (new, new // 2))
    value = (long - short) / (new - new // 2) * 1e3
    return Row({"drafter": "plain decode", "batch": 1}, "time of a token", value, "ms")


def width_rows(profile: Profile, name: str) -> list[Row]:
    """Times of rounds, and the chance of each draft at which they pay."""
    base = profile.seconds[0] * 1e3
    rows = []
    for width, seconds in zip(profile.widths, profile.seconds, strict=True):
        case = {"model": name, "width": width, "batch": profile.batch}
        rows.append(Row(case, "time of a round", seconds * 1e3, "ms", base))
        if width > 1:
            even = _break_even(profile.cost(width), width - 1)
            rows.append(Row(case, "break-even acceptance", even, "1"))
    return rows


def _break_even(cost: float, gamma: int) -> float:
    """The constant chance at which drafts that cost nothing just pay; 1 if never."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        tau = sum(middle**j for j in range(gamma + 1))
        low, high = (middle, high) if tau < cost else (low, middle)
    return high


def drafters_of(model: Any, params: Any) -> dict[str, Drafter]:
    """Drafters that need no training."""
    table = successors(model, params)
    recycling = TokenRecycling(15, table=table)
    return {
        "prompt_lookup": PromptLookup(7, min_ngram=2),
        "recycling": recycling,
        "hybrid": Hybrid(recycling, PromptLookup(7, min_ngram=2)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prompts", nargs="?", type=Path)
    parser.add_argument("--tag", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=int, help="prompts of the part `speed`")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds, random weights")
    args = parser.parse_args(arguments)
    rows = smoke() if args.smoke else measure(args)
    for row in rows:
        print(dict(row.case), row.metric, f"{row.value:.4g}", row.unit, row.ratio or "")
    print(write("speculative", rows, device_tag=args.tag, directory=args.out))


def measure(args: Any) -> list[Row]:
    """All parts that were asked for."""
    if args.prompts is None:
        raise SystemExit("name a file of prompts, or use --smoke")
    rows: list[Row] = []
    small = {"equality", "speed", "width"} & set(args.parts)
    if small:
        rows += _small(args)
    if "large" in args.parts:
        model = LanguageModel(MODELS["8b"], jnp.bfloat16, fused=True)
        params = random_params(model, "bfloat16")
        found = profile_target(
            model, params, (1, 2, 4, 8, 16, 32), slots=512, repeats=3, cache=False
        )
        rows += width_rows(found, "8b")
    return rows


def _small(args: Any) -> list[Row]:
    rows: list[Row] = []
    for dtype in (jnp.bfloat16, jnp.float32):
        name = jnp.dtype(dtype).name
        if name == "float32" and "equality" not in args.parts:
            continue
        loaded = load_model("smollm2", dtype=dtype, compute_dtype=dtype)
        model, params = prepare_decoder(loaded.model, loaded.params)
        tokenizer = loaded.tokenizer
        assert tokenizer is not None

        def encode(text: str, tokenizer: Any = tokenizer) -> list[int]:
            return tokenizer.encode(tokenizer.chat(text))

        prompts = read_prompts(args.prompts, encode, EQUAL_LENGTH, None)
        drafters = drafters_of(model, params)
        sizes: dict[str, Any] = {"length": LENGTH, "new": NEW}
        if name == "bfloat16" and "width" in args.parts:
            found = profile_target(model, params, WIDTHS, slots=704, cache=False)
            rows += width_rows(found, "smollm2")
        if name == "bfloat16" and "speed" in args.parts:
            rows.append(plain_decode(model, params, LENGTH, NEW))
            some = read_prompts(args.prompts, encode, LENGTH, args.limit)
            for batch in args.batches:
                rows += speed(model, params, some, drafters, batch=batch, **sizes)
        if "equality" in args.parts:
            ids = [p for _, p in prompts]
            for exact in ("fast", "same_width")[: 2 if name == "bfloat16" else 1]:
                with jax.default_matmul_precision("highest"):
                    rows += equality(
                        *(model, params, ids, drafters),
                        name=name,
                        exact=exact,
                        batch=min(40, len(ids)),
                        **{**sizes, "length": EQUAL_LENGTH},
                    )
    return rows


def smoke() -> list[Row]:
    """The same functions on a tiny model and made-up prompts."""
    from angeljax.models import DecoderConfig

    config = DecoderConfig(
        model_type="llama",
        vocab_size=256,
        hidden_size=32,
        num_layers=1,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
    )
    model = LanguageModel(config)
    model, params = prepare_decoder(model, model.init(jax.random.key(0)))
    some = [("chat", [5, 6, 7, 5, 6]), ("code", [9, 9, 8])]
    drafters: dict[str, Drafter] = {"prompt_lookup": PromptLookup(3)}
    sizes: dict[str, Any] = {"length": 8, "new": 8}
    rows = width_rows(profile_target(model, params, (1, 4), slots=64, cache=False), "t")
    rows += speed(model, params, some, drafters, batch=1, **sizes)
    ids = [p for _, p in some]
    return rows + equality(
        *(model, params, ids, drafters), name="float32", exact="fast", batch=2, **sizes
    )


if __name__ == "__main__":
    main()
