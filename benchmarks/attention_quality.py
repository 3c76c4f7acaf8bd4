"""What sparse prefill costs in quality, for each selector at equal density.

    python -m benchmarks.attention_quality --model M --text ids.npy.xz ...
        --needle needle.jsonl --documents heldout.txt --tag h100

For prompts of the model's whole context: perplexity of the last tokens of a text and
the KL divergence of the next-token distributions from dense attention; how many
sentences hidden in a long text ("needles") are found, by depth; and how well sentences
are continued that stand in one of several documents. Prompts are read sparsely, answers
are decoded densely and compared token by token with what is right. Density and recall
are measured on the first window, on activations of the dense model. `--smoke` runs
everything on a tiny random model and made-up tokens, without any file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import (
    AShape,
    Dilated,
    SparseAttention,
    Strided,
    TriShape,
    attention_report,
    selector,
)
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    causal_attention,
    load_model,
    stack_layers,
)
from angeljax.train import load_tokens
from benchmarks import _attention_data as data
from benchmarks._results import RESULTS, Row, write

# Selectors with a share of the blocks as an option.
BY_SHARE = (
    "xattention",
    "cosa",
    "flexprefill",
    "minference",
    "flashprefill",
    "vecattention",
)
# Stem and what is left of it without its parts. At 8k tokens the 4 first and 4 last
# blocks of long prompts would be a quarter of all: 1 and 2 leave it a choice.
STEM: dict[str, dict[str, Any]] = {
    "stem": {},
    "stem, no decay": {"alpha": 1.0},
    "stem, no bonus": {"value_weight": 0.0},
    "stem, neither": {"alpha": 1.0, "value_weight": 0.0},
    "stem, 4 and 4 forced": {"sink_blocks": 4, "window_blocks": 4},
    "stem, 4 cells": {"cells": 4},
    "stem, 8 cells": {"cells": 8},
    "stem, rows": {"budget_mode": "rows"},
    "stem, rows, no bonus": {"budget_mode": "rows", "value_weight": 0.0},
    "stem, rows, 4 cells": {"budget_mode": "rows", "cells": 4},
    "stem, rows, 8 cells": {"budget_mode": "rows", "cells": 8},
}
# Blocks that are always read, in blocks: as few for all, for the same reason.
ALWAYS = {
    "flashprefill": {"sink_tokens": 1, "window_tokens": 2},
    "vecattention": {"sink_tokens": 1, "window_tokens": 1},
}
STATIC = ("a_shape", "tri_shape", "dilated", "strided")
CORRECTED = {"stem + means": "stem", "flashprefill + means": "flashprefill"}
NAMES = (*STEM, *BY_SHARE, *STATIC, *CORRECTED)


def attention(name: str, share: float, length: int, block: int) -> SparseAttention:
    """A row: a selector that reads a share of the causal blocks in every layer."""
    on: dict[str, Any] = {"dense_below": 0, "dense_above": 1.0}
    if name in CORRECTED:
        base = attention(CORRECTED[name], share, length, block)
        return dataclasses.replace(base, mean_correction=True)
    chosen: Any
    if name in STEM:
        options = {
            "budget_mode": "density",
            "sink_blocks": 1,
            "window_blocks": 2,
            **STEM[name],
        }
        chosen = selector(
            "stem",
            block_size=block,
            keep_ratio=share,
            dense_layers=0,
            **options,
        )
    elif name in BY_SHARE:
        always = {k: n * block for k, n in ALWAYS.get(name, {}).items()}
        chosen = selector(name, block_size=block, keep_ratio=share, **always)
    else:
        chosen = _static(name, share, length, block)
    return SparseAttention(chosen, **on)


def _static(name: str, share: float, length: int, block: int) -> Any:
    """The pattern whose density is nearest to the share."""
    blocks = range(1, length // block + 1)
    many: list[Any]
    if name in ("a_shape", "tri_shape"):
        cls = AShape if name == "a_shape" else TriShape
        sizes = {"block_size": block, "sink_tokens": block}
        many = [cls(**sizes, window_tokens=(n - 1) * block + 1) for n in blocks]
    elif name == "dilated":
        many = [Dilated(block_size=block, dilation=n) for n in blocks]
    else:
        many = [Strided(block_size=block, stride_blocks=n) for n in blocks]
    return min(many, key=lambda s: abs(s.density(length) - share))


@functools.partial(jax.jit, static_argnames=("model", "tail"))
def text_step(params: Any, windows: jax.Array, model: Any, tail: int) -> Any:
    """Means for each window: loss, KL from dense, agreement of the likeliest token."""
    dense = dataclasses.replace(model, attention_fn=causal_attention)

    def logits(model: LanguageModel, tokens: jax.Array) -> jax.Array:
        module = model.bind(params)
        final = module.features(tokens[None]).final[:, -tail:]
        return jax.nn.log_softmax(module.head(final)[0])

    def one(window: jax.Array) -> Any:
        tokens, targets = window[:-1], window[-tail:]
        got, want = logits(model, tokens), logits(dense, tokens)
        loss = -jnp.take_along_axis(got, targets[:, None], axis=-1)
        kl = jnp.sum(jnp.exp(want) * (want - got), axis=-1)
        return loss.mean(), kl.mean(), (got.argmax(-1) == want.argmax(-1)).mean()

    return jax.lax.map(one, windows)


@functools.partial(jax.jit, static_argnames=("model",))
def prompt_step(params: Any, prompts: Any, model: LanguageModel) -> jax.Array:
    """bool `[N, most tokens]`: whether each token of an answer is the likeliest.

    Each is told what stands before it, so a row of True is what greedy decoding would
    have written. Tokens of the answer are read in one step, densely.
    """

    def one(prompt: Any) -> jax.Array:
        tokens, mask, answer = (x[None] for x in prompt)
        length = tokens.shape[1]
        cache: Any = model.init_cache(1, length + answer.shape[1])
        first, cache = model.apply(
            params,
            tokens,
            mask=mask,
            cache=cache,
            last_only=True,
            start=0,
            total=length,
        )
        rest, _ = model.apply(params, answer[:, :-1], cache=cache)
        return jnp.concatenate([first, rest], axis=1)[0].argmax(-1) == answer[0]

    return jax.lax.map(one, prompts)


def answered(params: Any, sets: Any, model: Any) -> dict[str, tuple[float, str]]:
    """Accuracies of all sets of prompts; those of one length in one call."""
    out: dict[str, tuple[float, str]] = {}
    most = max(p.answers.shape[1] for p in sets.values())
    for length in sorted({p.tokens.shape[1] for p in sets.values()}):
        mine = {n: p for n, p in sets.items() if p.tokens.shape[1] == length}
        arrays = [
            np.concatenate([getattr(p.padded(most), name) for p in mine.values()])
            for name in ("tokens", "mask", "answers")
        ]
        right = prompt_step(params, tuple(map(jnp.asarray, arrays)), model)
        ends = np.cumsum([len(p.tokens) for p in mine.values()])[:-1]
        for (name, p), hits in zip(
            mine.items(), np.split(np.asarray(right), ends), strict=True
        ):
            wanted = p.padded(most).wanted
            found = np.all(hits | ~wanted, axis=1)
            out[f"{name} accuracy"] = float(found.mean()), "1"
            share = (hits & wanted).sum() / wanted.sum()
            out[f"{name} token accuracy"] = float(share), "1"
            if name.startswith("needle"):
                for depth in np.unique(p.depths):
                    at = found[p.depths == depth]
                    out[f"{name} at {depth:g}"] = float(at.mean()), "1"
    return out


def tiny() -> tuple[LanguageModel, Any, None]:
    """A random model for `--smoke`."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    model = LanguageModel(config)
    return model, model.init(jax.random.key(0)), None


def opened(source: str) -> tuple[LanguageModel, Any, Any]:
    """A model, its params and its tokenizer."""
    dtype = jnp.bfloat16 if jax.default_backend() != "cpu" else jnp.float32
    loaded = load_model(source, dtype=dtype, compute_dtype=dtype)
    return loaded.model, loaded.params, loaded.tokenizer


def measure(
    model: LanguageModel, params: Any, windows: Any, sets: Any, tail: int
) -> dict[str, tuple[float, str]]:
    """Metric -> value and unit."""
    out: dict[str, tuple[float, str]] = {}
    if len(windows):
        loss, kl, same = text_step(params, jnp.asarray(windows), model, tail)
        out["perplexity"] = math.exp(float(loss.mean())), "1"
        out["kl"] = float(kl.mean()), "nats"
        out["top1_agreement"] = float(same.mean()), "1"
    return {**out, **(answered(params, sets, model) if sets else {})}


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", nargs="*", default=[], help="token files or texts")
    parser.add_argument("--needle", type=Path, help="JSON lines")
    parser.add_argument("--needle-lengths", default="7680")
    parser.add_argument("--documents", type=Path, nargs="*", default=[])
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--selectors", default=";".join(NAMES), help="with semicolons")
    parser.add_argument("--densities", default="0.25,0.5")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--tail", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64, help="queries of the recall")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tag", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.names = [name.strip() for name in args.selectors.split(";")]
    if unknown := [name for name in args.names if name not in NAMES]:
        parser.error(f"unknown selector {unknown[0]!r}: use {'; '.join(NAMES)}")
    if args.smoke:
        args.length, args.tail, args.windows, args.block_size = 128, 32, 2, 16
        args.rows, args.densities = 8, args.densities.split(",")[-1]
        if args.names == list(NAMES):
            args.names = ["stem", "flexprefill", "a_shape", "stem + means"]
    elif not (args.text or args.needle or args.documents):
        parser.error("nothing to measure: pass --text, --needle or --documents")
    return args


def material(args: Any, model: LanguageModel, tokenizer: Any) -> Any:
    """Windows of text and the sets of prompts."""
    length = args.length
    if args.smoke:
        vocab = model.config.vocab_size
        windows, prompts = data.made_up(vocab, length, args.windows)
        return windows, {"needle": prompts, "documents": prompts}
    windows = np.zeros((0, length + 1), np.int32)
    if args.text:
        ids = load_tokens(tuple(args.text), tokenizer).astype(np.int32)
        count = min(args.windows, (len(ids) - 1) // length)
        starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
        windows = np.stack([ids[s : s + length + 1] for s in starts])
    sets = {}
    if args.needle:
        for size in map(int, args.needle_lengths.split(",")):
            sets[f"needle {size}"] = data.needles(args.needle, tokenizer, size)
    if args.documents:
        # As long as the longest needles, so that one call serves both.
        sets["documents"] = data.questions(
            args.documents,
            tokenizer,
            length=int(args.needle_lengths.split(",")[-1]),
            count=args.questions,
            documents=8,
        )
    return windows, sets


def main() -> None:
    """Measures every row and writes after each."""
    args = arguments()
    model, params, tokenizer = tiny() if args.smoke else opened(args.model)
    params = jax.jit(stack_layers)(params)
    model = dataclasses.replace(model, scan_layers=True)
    windows, sets = material(args, model, tokenizer)
    rows: list[Row] = []
    dense = measure(model, params, windows, sets, args.tail)
    around = {"length": args.length, "block": args.block_size}
    for metric, (value, unit) in dense.items():
        case = {"selector": "dense", "density": 1.0, **around}
        rows.append(Row(case, metric, value, unit))
    print("dense", {k: round(v, 4) for k, (v, _) in dense.items()}, flush=True)
    for share in map(float, args.densities.split(",")):
        for name in args.names:
            began = time.perf_counter()
            fn = attention(name, share, args.length, args.block_size)
            sparse = dataclasses.replace(model, attention_fn=fn)
            found = measure(sparse, params, windows, sets, args.tail)
            if len(windows):
                tokens = jnp.asarray(windows[:1, :-1])
                report = attention_report(model, params, tokens, fn, rows=args.rows)
                found["measured density"] = float(report.density.mean()), "1"
                found["recall"] = float(report.recall.mean()), "1"
            case = {"selector": name, "density": share, **around}
            for metric, (value, unit) in found.items():
                base = dense[metric][0] if metric in dense else None
                rows.append(Row(case, metric, value, unit, baseline=base))
            seconds = time.perf_counter() - began
            shown = {k: round(v, 4) for k, (v, _) in found.items()}
            print(f"{name} {share:g} ({seconds:.0f} s)", shown, flush=True)
            write("attention_quality", rows, device_tag=args.tag, directory=args.out)


if __name__ == "__main__":
    main()
