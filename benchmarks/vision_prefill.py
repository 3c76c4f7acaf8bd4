"""Prefill of a vision-language model of 7B parameters, with fewer vision tokens.

    python -m benchmarks.vision_prefill [--tag h100] [--keep 1.0 0.25 0.1] [--smoke]

The shapes are those of Qwen2.5-VL-7B, the weights random and bfloat16: one image of
1080 x 1920 is 2691 tokens of the decoder, beside 64 of text. What is timed, each one
compiled call:

    "vision"   the vision tower, from patches to tokens;
    "select"   IDPruner's choice alone: the learned scorer, with random weights, and
               the greedy search;
    "prefill"  from embeddings to the logits of the next token, with the choice and the
               gathering of what is left; keep 1.0 has neither. Without a cache.

`baseline` of "prefill" is the whole prompt, in the same run; `ratio` is how many times
faster. `roofline` is the share of the peak of bfloat16 products. An H100 takes less
than 90 seconds for all of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models import DecoderConfig, QwenVL, QwenVLConfig, causal_attention
from angeljax.models.qwen_vl import QwenVisionConfig, rope_index
from angeljax.tokens import (
    Prompt,
    Selection,
    apply_selection,
    init_scorer,
    keep_count,
    prune,
    score_tokens,
)
from benchmarks._attention_timing import PEAK, alternate
from benchmarks._results import Row, write

Calls = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]

TEXT = 64
BEFORE = 16  # tokens of text before the image; the others follow it
SEVEN = QwenVLConfig(
    model_type="qwen2_5_vl",
    text=DecoderConfig(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        intermediate_size=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_positions=128000,
        norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        attention_bias=True,
    ),
    vision=QwenVisionConfig(
        model_type="qwen2_5_vl",
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        patch_size=14,
        window_size=112,
        full_layers=(7, 15, 23, 31),
        tokens_per_second=2,
    ),
)
TINY = QwenVLConfig(
    model_type="qwen2_5_vl",
    text=DecoderConfig(
        model_type="qwen2",
        vocab_size=256,
        hidden_size=64,
        num_layers=2,
        intermediate_size=96,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        mrope_section=(4, 6, 6),
        attention_bias=True,
    ),
    vision=QwenVisionConfig(
        model_type="qwen2_5_vl",
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        patch_size=14,
        window_size=112,
        full_layers=(1,),
        tokens_per_second=2,
    ),
    image_token_id=254,
    video_token_id=255,
)
GRID = (1, 78, 138)  # 1092 x 1932 pixels
TINY_GRID = (1, 12, 20)


def random_params(model: QwenVL, dtype: Any = jnp.bfloat16) -> Any:
    """Random weights, made on the device one leaf at a time."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
        return std * jax.random.normal(key, shape, dtype)

    paths, treedef = jax.tree_util.tree_flatten_with_path(model.abstract(dtype))
    leaves = []
    for i, (path, leaf) in enumerate(paths):
        if path[-1].key == "scale":
            leaves.append(jnp.ones(leaf.shape, dtype))
        else:
            std = 0.0 if path[-1].key == "bias" else 0.02
            leaves.append(normal(jax.random.key(i, impl="rbg"), leaf.shape, std))
    return jax.tree.unflatten(treedef, leaves)


def decoder_flops(config: DecoderConfig, tokens: int) -> float:
    """FLOP of products and causal attention; one row of logits."""
    d, m, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    layer = 2 * tokens * (d * (2 * q + 2 * kv) + 3 * d * m) + 2 * tokens**2 * q
    return config.num_layers * layer + 2.0 * d * config.vocab_size


def vision_flops(config: QwenVisionConfig, grid: tuple[int, int, int]) -> float:
    """FLOP of the tower's products and attention, windows taken as whole ones."""
    patches = grid[0] * grid[1] * grid[2]
    d, m = config.hidden_size, config.intermediate_size
    window = (config.window_size // config.patch_size) ** 2
    full = len(config.full_layers)
    sees = full * patches / grid[0] + (config.depth - full) * min(window, patches)
    layers = config.depth * 2.0 * patches * (4 * d * d + 3 * d * m)
    wide = d * config.merge_unit
    merger = 2.0 * patches / config.merge_unit * wide * (wide + config.out_hidden_size)
    return layers + 4.0 * patches * sees * d + merger


def prompt_of(model: QwenVL, grid: tuple[int, int, int]) -> Prompt:
    """Random embeddings of a prompt with an image."""
    config = model.config
    (count,) = model.num_tokens([grid])
    tokens = np.ones((1, TEXT + count), np.int32)
    tokens[:, BEFORE : BEFORE + count] = config.image_token_id
    shape = (*tokens.shape, config.text.hidden_size)
    embeds = jax.random.normal(jax.random.key(1), shape, model.dtype)
    return Prompt(
        embeds=embeds,
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(rope_index(config, tokens, images=[grid])),
    )


def select(scorer: Any, image: jax.Array, *, keep: float) -> Selection:
    """IDPruner's choice among the tokens of the image."""
    return prune(image, keep=keep, importance=score_tokens(scorer, image))


def prefill(
    params: Any, scorer: Any, prompt: Prompt, *, model: QwenVL, count: int, keep: float
) -> jax.Array:
    """Logits of the next token of a prompt; `keep` of the `count` of the image stay."""
    if keep < 1:
        span = (BEFORE, BEFORE + count)
        chosen = select(scorer, prompt.embeds[:, slice(*span)], keep=keep)
        prompt = apply_selection(chosen, prompt, span).prompt
    # The row is full: without a mask its attention is cuDNN's.
    return model.language.apply(
        params["language"],
        embeds=prompt.embeds,
        positions=prompt.positions,
        last_only=True,
    )[0]


def compiled(calls: Calls) -> dict[str, Callable[[], Any]]:
    """All of them, compiled at the same time."""
    start = time.perf_counter()
    lowered = {name: jax.jit(fn).lower(*args) for name, (fn, args) in calls.items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda x: x.compile(), lowered.values()))
    ready = dict(zip(calls, built, strict=True))
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return {name: functools.partial(ready[name], *calls[name][1]) for name in calls}


def measure(
    config: QwenVLConfig, grid: tuple[int, int, int], keeps: list[float], dtype: Any
) -> list[Row]:
    """All rows."""
    start = time.perf_counter()
    model = QwenVL(config, dtype, scan_layers=True, attention_fn=causal_attention)
    params = jax.block_until_ready(random_params(model, dtype))
    scorer = init_scorer(jax.random.key(2), config.text.hidden_size)
    prompt = prompt_of(model, grid)
    count = prompt.length - TEXT
    image = prompt.embeds[:, BEFORE : BEFORE + count]
    shape = (grid[1] * grid[2], config.vision.patch_dim)
    pixels = jax.random.normal(jax.random.key(3), shape, dtype)
    print(f"weights in {time.perf_counter() - start:.1f} s", flush=True)

    def see(params: Any, pixels: jax.Array) -> jax.Array:
        return model.vision(params, pixels, [grid]).embeds

    calls: Calls = {"vision": (see, (params, pixels))}
    for keep in keeps:
        run = functools.partial(prefill, model=model, count=count, keep=keep)
        calls[f"prefill {keep}"] = (run, (params, scorer, prompt))
        if keep < 1:
            choice = functools.partial(select, keep=keep)
            calls[f"select {keep}"] = (choice, (scorer, image))
    times = alternate(compiled(calls))
    rows, whole = [], times.get("prefill 1.0")
    for name, seconds in times.items():
        what, _, share = name.partition(" ")
        kept = keep_count(count, float(share)) if share else count
        case: dict[str, Any]
        case = {"model": "qwen2.5-vl-7b" if config is SEVEN else "tiny", "what": what}
        case |= {"vision_tokens": count, "kept": kept, "text_tokens": TEXT}
        flops = base = ratio = None
        if what == "vision":
            flops = vision_flops(config.vision, grid)
        elif what == "prefill":
            flops, base = decoder_flops(config.text, kept + TEXT), whole
        if base is not None:
            base, ratio = base * 1e3, base / seconds
        roofline = None if flops is None else flops / PEAK / seconds
        ms = seconds * 1e3
        rows.append(Row(case, "time", ms, "ms", base, ratio, roofline))
        faster = "" if ratio is None else f", {ratio:.2f}x"
        print(f"{what} {kept} of {count}: {ms:.3f} ms{faster}", flush=True)
    return rows


def main() -> None:
    """Measures and writes what was measured; a smoke run writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--keep", nargs="*", type=float, default=[1.0, 0.25, 0.1])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no file")
    args = parser.parse_args()
    if args.smoke:
        measure(TINY, TINY_GRID, args.keep, jnp.float32)
        return
    rows = measure(SEVEN, GRID, args.keep, jnp.bfloat16)
    print(write("vision_prefill", rows, device_tag=args.tag))


if __name__ == "__main__":
    main()
