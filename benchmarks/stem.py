"""Stem from queries to outputs against dense attention by cuDNN, in one run.

    python -m benchmarks.stem [--tag h100] [--quick] [--only operator|others|model]

`operator`: score, selection, lists and attention of one layer, 32 query heads on 8 key
heads of 128, bfloat16, batch 1, random q, k and v, Stem's own budgets (alpha 0.7). The
share of the selection is one minus attention over given lists as a part of the whole;
`memory` is what the compiled selection needs besides its arguments and results.
`others`: the same for every selector at the density of Stem. `model`: time to the first
token of a decoder with the shapes of an 8B model and random weights.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention import Place, SparseAttention, Stem, selector
from angeljax.models import DecoderConfig, LanguageModel, causal_attention
from benchmarks._attention_timing import alternate
from benchmarks._results import Row, write
from pallas_kernels import block_sparse_attention

TOKENS = (16384, 32768, 65536, 131072)
HEADS, KV_HEADS, DIM = 32, 8, 128
OTHERS = {
    "a_shape": {},
    "xattention": {"keep_ratio": 0.25},
    "flexprefill": {"keep_ratio": 0.25},
    "flashprefill": {"keep_ratio": 0.25},
    "minference": {},
    "cosa": {"keep_ratio": 0.25},
    "vecattention": {"keep_ratio": 0.25},
}


def inputs(tokens: int) -> tuple[jax.Array, ...]:
    """Random q, k and v."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (1, tokens, heads, DIM), jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )


def operator(tokens: int, name: str, chosen: Any) -> list[Row]:
    """One selector: the whole, its attention alone, and dense attention."""
    q, k, v = inputs(tokens)
    place = Place(layer=0, num_layers=1)

    def select(q: Any, k: Any, v: Any) -> Any:
        return chosen.select(q, k, v, place)

    def run(q: Any, k: Any, v: Any) -> Any:
        return block_sparse_attention(q, k, v, select(q, k, v))

    whole = jax.jit(run)
    attend = jax.jit(block_sparse_attention)
    dense = jax.jit(
        functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
    )
    compiled = jax.jit(select).lower(q, k, v).compile()
    memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    lists = compiled(q, k, v)
    n = lists.counts.shape[-1]
    density = float(lists.counts.mean()) * n / (n * (n + 1) / 2)
    times = alternate(
        {
            "whole": lambda: whole(q, k, v),
            "attention": lambda: attend(q, k, v, lists),
            "selection": lambda: compiled(q, k, v),
            "dense": lambda: dense(q, k, v),
        }
    )
    us = {key: value * 1e6 for key, value in times.items()}
    share = 1 - us["attention"] / us["whole"]
    case = {"tokens": tokens, "selector": name, "density": round(density, 3)}
    print(
        f"{tokens} {name}: density {density:.3f}, {us['whole']:.0f} us, "
        f"{us['dense'] / us['whole']:.2f}x of cuDNN ({us['dense']:.0f} us), attention "
        f"{us['attention']:.0f}, selection {share:.1%} ({us['selection']:.0f} us "
        f"alone), {memory / 2**20:.0f} MiB",
        flush=True,
    )
    ratio = us["dense"] / us["whole"]
    return [
        Row(case, "time", us["whole"], "us", us["dense"], ratio),
        Row(case, "attention", us["attention"], "us"),
        Row(case, "selection", us["selection"], "us"),
        Row(case, "selection share", share, "1"),
        Row(case, "memory", memory / 2**20, "MiB"),
    ]


def model(tokens: int, layers: int = 32) -> list[Row]:
    """Time to the first token, dense and with Stem."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=layers,
        intermediate_size=14336,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        rope_theta=500000.0,
    )
    make = functools.partial(
        LanguageModel, config, dtype=jnp.bfloat16, scan_layers=True
    )
    plain = make(attention_fn=causal_attention)
    sparse = make(attention_fn=SparseAttention(Stem()))
    params = jax.jit(lambda key: plain.init(key, jnp.bfloat16))(jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (1, tokens), 0, config.vocab_size)

    def first(chosen: LanguageModel) -> Any:
        def run(params: Any, prompt: jax.Array) -> jax.Array:
            logits, _ = chosen.apply(params, prompt, last_only=True)
            return jnp.argmax(logits[:, -1], -1)

        return jax.jit(run)

    run = {"dense": first(plain), "sparse": first(sparse)}
    times = alternate(
        {name: functools.partial(f, params, prompt) for name, f in run.items()},
        seconds=0.5,
        rounds=3,
    )
    case = {"tokens": tokens, "selector": "stem", "layers": layers, "model": "8B"}
    ms, base = times["sparse"] * 1e3, times["dense"] * 1e3
    print(f"{tokens}: {ms:.0f} ms to the first token, dense {base:.0f}", flush=True)
    return [Row(case, "time to first token", ms, "ms", base, base / ms)]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--quick", action="store_true", help="short prompts only")
    parser.add_argument(
        "--only", nargs="*", default=["operator", "others", "model"],
        choices=["operator", "others", "model"],
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    rows: list[Row] = []
    stem = Stem(dense_layers=0)
    if "operator" in args.only:
        for tokens in TOKENS[:1] if args.quick else TOKENS:
            rows += operator(tokens, "stem", stem)
            write("stem", rows, device_tag=args.tag)
        if not args.quick:
            shared = Stem(dense_layers=0, select_per="kv_head")
            rows += operator(TOKENS[-1], "stem per key head", shared)
    if "others" in args.only:
        for name, options in OTHERS.items():
            try:
                rows += operator(TOKENS[1], name, selector(name, **options))
            except Exception as e:  # one that fails must not end the run
                print(f"{name}: {str(e).splitlines()[0][:200]}", flush=True)
    if "model" in args.only:
        for tokens in (4096,) if args.quick else (32768, 131072):
            rows += model(tokens, args.layers)
    print(write("stem", rows, device_tag=args.tag))


if __name__ == "__main__":
    main()
