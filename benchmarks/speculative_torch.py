"""Plain decoding by PyTorch, beside that of `benchmarks.speculative`.

    python -m benchmarks.speculative_torch [--tag h100] [--seconds 90]

`transformers` generates greedily with a static cache at batch 1: a Llama of the shape
of SmolLM2-135M with random weights in bfloat16, which take as long as others. Eager;
compiled, as it does by itself for such a cache (`mode="reduce-overhead"`: CUDA graphs);
and the compiled forward in a bare loop, without what `generate` does around it. A
prompt of 64 tokens; the time of a token is that of many tokens less that of few.
PyTorch is no dependency of the library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, Row, write
from benchmarks.decode_step import MODELS

PROMPT, SLOTS, FEW, MANY = 64, 960, 16, 144


def build(device: str, layers: int | None = None) -> Any:
    """The model in bfloat16, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = MODELS["smollm2"]
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=layers or c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=c.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    # Nothing ends a text early.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def seconds_of_token(
    model: Any, device: str, *, compiled: bool, repeats: int = 3
) -> float:
    """Of greedy generation with a static cache; the better of some differences."""
    import torch
    from transformers import StaticCache

    ids = torch.arange(1, PROMPT + 1, device=device)[None]
    wait: Callable[[], Any] = (
        torch.cuda.synchronize if device == "cuda" else lambda: None
    )

    def once(count: int) -> float:
        cache = StaticCache(config=model.config, max_cache_len=SLOTS)
        wait()
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                disable_compile=not compiled,
            )
        wait()
        assert out.shape[1] == PROMPT + count, "a text ended early"
        return time.perf_counter() - start

    for _ in range(2):
        once(FEW)
    long, short = (min(once(n) for _ in range(repeats)) for n in (MANY, FEW))
    return (long - short) / (MANY - FEW)


def graph_seconds(model: Any, device: str, steps: int = 128) -> float:
    """Of a compiled forward of one token and the choice of the next, in a loop."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    ids = torch.arange(1, PROMPT + 1, device=device)[None]
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def where(at: Any) -> dict[str, Any]:
        # Newer caches count by themselves.
        named = "cache_position" in inspect.signature(model.forward).parameters
        return {"cache_position": at} if named else {}

    def step(token: Any, at: Any) -> Any:
        out = forward(token, past_key_values=cache, position_ids=at[None], **where(at))
        # Its memory belongs to the graph, which runs again.
        return out.logits[:, -1:].argmax(-1).clone()

    def run(count: int) -> float:
        at = torch.tensor([PROMPT], device=device)
        token = ids[:, -1:].clone()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token, at)
            at = at + 1
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        positions = torch.arange(PROMPT, device=device)
        model(ids, past_key_values=cache, **where(positions))
        for _ in range(2):
            run(4)  # compiles and records
        long, short = (min(run(n) for _ in range(3)) for n in (steps, steps // 8))
    return (long - short) / (steps - steps // 8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tag", default="h100")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, help="fewer, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    end = time.perf_counter() + args.seconds
    # What is written names the device by JAX, which must leave memory to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    model = build(args.device, args.layers)
    rows: list[Row] = []

    def add(way: str, seconds: float) -> None:
        case = {"part": "torch", "way": way, "batch": 1, **versions}
        rows.append(Row(case, "time of a token", seconds * 1e3, "ms"))
        print(way, f"{seconds * 1e3:.4g} ms", flush=True)
        write("speculative_torch", rows, device_tag=args.tag, directory=args.out)

    # A compilation cannot be stopped, and CUDA graphs belong to the main thread: when
    # the time has passed the process ends with what is written.
    timer = threading.Timer(max(1.0, end - time.perf_counter()), _give_up)
    timer.daemon = True
    timer.start()
    add("generate, eager", seconds_of_token(model, args.device, compiled=False))
    if args.device == "cuda":
        compiled = seconds_of_token(model, args.device, compiled=True)
        add("generate, compiled", compiled)
        add("compiled forward in a loop", graph_seconds(model, args.device))
    timer.cancel()


def _give_up() -> None:
    print("the time has passed: what was measured is written", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
