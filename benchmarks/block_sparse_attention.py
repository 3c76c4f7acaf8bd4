"""Block-sparse attention against dense attention by cuDNN, in one run.

    python -m benchmarks.block_sparse_attention [--tag h100] [--quick] [--skip flex ...]

Causal prefill in bfloat16, random q, k and v, blocks of 128, random lists of a given
share of the causal blocks with the diagonal always among them. The baseline is
`jax.nn.dot_product_attention(is_causal=True, implementation="cudnn")`; kernels take
turns, so that all of them meet the same clock. `roofline` is executed FLOP (whole
blocks) over the peak of the tensor cores in that precision. Rows named `fp8` have keys
and values in 8 bits, rounded before (queries are rounded in every call); those named
`fp8 with rounding` round all three. Beside the kernel: the backward pass, the Triton
and XLA implementations, and PyTorch's FlexAttention with the same lists where PyTorch
is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._attention_timing import PEAK, alternate, causal_flops
from benchmarks._results import Row, write
from pallas_kernels import (
    BlockLists,
    block_sparse_attention,
    block_sparse_attention_fp8,
    quantize_kv,
)

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one measurement."""

    tokens: int
    densities: tuple[float, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    batch: int = 1

    def fields(self, density: float, what: str) -> dict[str, Any]:
        """What names a row."""
        return {
            "tokens": self.tokens,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.dim,
            "density": round(density, 3),
            "what": what,
        }


CASES = [
    Case(16384, (0.5, 0.25, 0.1)),
    Case(32768, (1.0, 0.5, 0.25, 0.1)),
    Case(65536, (1.0, 0.5, 0.25, 0.1)),
    Case(131072, (0.25, 0.1)),
    Case(16384, (0.25,), batch=4),
    Case(32768, (0.25,), dim=64),
    Case(32768, (0.25,), heads=28, kv_heads=4),
    Case(16384, (0.25,), heads=16, dim=256),
    Case(16384, (0.25,), heads=32, kv_heads=32, dim=80),
    Case(16384, (0.25,), heads=32, kv_heads=32, dim=96),
]
FLOAT8 = [Case(32768, (0.25,)), Case(65536, (1.0, 0.5, 0.25, 0.1))]
QUICK = [Case(2048, (0.5,), heads=4, kv_heads=2)]


def random_lists(key: jax.Array, c: Case, density: float) -> BlockLists:
    """Lists of random causal blocks, a share of `density`, and the diagonal."""
    n = c.tokens // BLOCK
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    chosen = jax.random.uniform(key, (c.batch, c.heads, n, n)) < density
    mask = (chosen & (j < i)) | (j == i)
    return BlockLists.from_mask(mask, block_q=BLOCK, block_k=BLOCK)


def inputs(c: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random q, k and v."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = c.heads, c.kv_heads, c.kv_heads
    shapes = [(c.batch, c.tokens, h, c.dim) for h in heads]
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return q, k, v


def executed(c: Case, lists: BlockLists) -> float:
    """FLOP of the listed blocks, whole."""
    return 4.0 * c.dim * BLOCK * BLOCK * float(lists.counts.sum())


def forward(c: Case) -> list[Row]:
    """The kernel at all densities of a case."""
    q, k, v = inputs(c)
    dense = jax.jit(
        functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
    )
    sparse = jax.jit(block_sparse_attention)
    make = jax.jit(random_lists, static_argnums=(1, 2))
    rows = []
    for density in c.densities:
        lists = make(jax.random.key(1), c, density)
        n = c.tokens // BLOCK
        share = float(lists.counts.mean()) * n / (n * (n + 1) / 2)
        calls: dict[str, Any] = {"sparse": lambda lists=lists: sparse(q, k, v, lists)}
        if c.dim <= 128 or c.dim == 256:
            calls["dense"] = lambda: dense(q, k, v)
        times = alternate(calls)
        rows += _rows(c, share, times, executed(c, lists))
    return rows


def float8(c: Case) -> list[Row]:
    """The kernel with keys and values in 8 bits, beside bfloat16 and cuDNN."""
    q, k, v = inputs(c)
    dense = jax.jit(
        functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
    )
    half = jax.jit(block_sparse_attention)
    rounded = jax.jit(block_sparse_attention_fp8)
    whole = jax.jit(functools.partial(block_sparse_attention, kv_dtype="float8_e4m3fn"))
    kv = jax.jit(quantize_kv)(k, v)
    make = jax.jit(random_lists, static_argnums=(1, 2))
    rows = []
    for density in c.densities:
        lists = make(jax.random.key(1), c, density)
        n = c.tokens // BLOCK
        share = float(lists.counts.mean()) * n / (n * (n + 1) / 2)
        calls = {
            "mosaic_gpu": functools.partial(half, q, k, v, lists),
            "fp8": functools.partial(rounded, q, kv, lists),
            "fp8 with rounding": functools.partial(whole, q, k, v, lists),
            "dense": functools.partial(dense, q, k, v),
        }
        want, got = (np.asarray(calls[w](), np.float32) for w in ("mosaic_gpu", "fp8"))
        error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
        print(f"fp8 is {error:.4f} off in the root mean square", flush=True)
        times = alternate(calls)
        for name in ("fp8", "fp8 with rounding"):
            pair = {"sparse": times[name], "dense": times["dense"]}
            rows += _rows(c, share, pair, executed(c, lists), name)
        base = {"sparse": times["mosaic_gpu"], "dense": times["dense"]}
        _rows(c, share, base, executed(c, lists))  # printed: `forward` has its row
        rows.append(Row(c.fields(share, "fp8"), "error", error, "1"))
    return rows


def _rows(
    c: Case,
    share: float,
    times: dict[str, float],
    flop: float,
    name: str = "mosaic_gpu",
) -> list[Row]:
    us, base = times["sparse"] * 1e6, times["dense"] * 1e6
    case = c.fields(share, name)
    rate = flop / times["sparse"]
    peak = PEAK * (2 if name.startswith("fp8") else 1)
    dense = causal_flops(c.batch, c.heads, c.tokens, c.dim) / times["dense"]
    print(
        f"{c.tokens} x {c.batch}, {c.heads}/{c.kv_heads} x {c.dim}, {share:.3f}, "
        f"{name}: "
        f"{us:.0f} us, {rate / 1e12:.0f} TFLOP/s, {base / us:.2f}x of cuDNN "
        f"({base:.0f} us, {dense / 1e12:.0f} TFLOP/s)",
        flush=True,
    )
    return [
        Row(case, "time", us, "us", base, base / us, rate / peak),
        Row(case, "executed", rate / 1e12, "TFLOP/s", dense / 1e12, rate / dense),
    ]


def others(c: Case) -> list[Row]:
    """Triton, XLA and the backward pass against the kernel."""
    q, k, v = inputs(c)
    density = c.densities[0]
    make = jax.jit(random_lists, static_argnums=(1, 2))
    lists = make(jax.random.key(1), c, density)
    dense = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    rows = []
    run = {
        name: jax.jit(functools.partial(block_sparse_attention, implementation=name))
        for name in ("mosaic_gpu", "triton", "xla")
    }

    def gradient(f: Any) -> Any:
        return jax.jit(
            jax.grad(
                lambda q, k, v, *r: f(q, k, v, *r).astype(jnp.float32).sum(), (0, 1, 2)
            )
        )

    pairs: dict[str, tuple[Any, Any]] = {}
    for name, f in run.items():
        pairs[name] = (functools.partial(f, q, k, v, lists), jax.jit(dense))
    pairs["forward and backward"] = (
        functools.partial(gradient(block_sparse_attention), q, k, v, lists),
        gradient(dense),
    )
    for name, (f, baseline) in pairs.items():
        try:
            dense_call = functools.partial(baseline, q, k, v)
            times = alternate({"sparse": f, "dense": dense_call}, rounds=3)
        except Exception as e:  # what is not installed must not end the run
            print(f"{name}: {str(e).splitlines()[0][:200]}", flush=True)
            continue
        us, base = times["sparse"] * 1e6, times["dense"] * 1e6
        print(f"{c.tokens} {name}: {us:.0f} us, {base / us:.2f}x of cuDNN", flush=True)
        rows.append(Row(c.fields(density, name), "time", us, "us", base, base / us))
    return rows


def flex(c: Case) -> list[Row]:
    """PyTorch's FlexAttention over the same lists."""
    try:
        import torch
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError as e:
        print(f"FlexAttention: {e}", flush=True)
        return []
    attend = torch.compile(flex_attention)
    rows = []
    make = jax.jit(random_lists, static_argnums=(1, 2))
    run = jax.jit(block_sparse_attention)
    for density in c.densities:
        lists = make(jax.random.key(1), c, density)
        q, k, v = inputs(c)
        call_ours = functools.partial(run, q, k, v, lists)
        ours = alternate({"sparse": call_ours})["sparse"]
        counts, indices = (
            torch.from_numpy(np.array(x)).cuda() for x in (lists.counts, lists.indices)
        )
        n = c.tokens // BLOCK
        if lists.width < n:
            pad = torch.zeros((*indices.shape[:3], n - lists.width), dtype=torch.int32)
            indices = torch.cat([indices, pad.cuda()], dim=-1)
        # The diagonal, last of its list, is the one that needs the mask.
        partial = indices.gather(-1, (counts - 1)[..., None].long())
        partial = torch.nn.functional.pad(partial, (0, n - 1)).contiguous()
        mask = BlockMask.from_kv_blocks(
            torch.ones_like(counts),
            partial,
            counts - 1,
            indices,
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda b, h, i, j: i >= j,
        )
        shape = [(c.batch, h, c.tokens, c.dim) for h in (c.heads, *(c.kv_heads,) * 2)]
        arrays = [torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in shape]

        def call(arrays: Any = arrays, mask: Any = mask) -> Any:
            return attend(*arrays, block_mask=mask, enable_gqa=True)

        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        end.record()
        torch.cuda.synchronize()
        us = start.elapsed_time(end) * 100
        case = c.fields(density, f"FlexAttention, PyTorch {torch.__version__}")
        print(f"{c.tokens} {density} FlexAttention: {us:.0f} us, ours {ours * 1e6:.0f}")
        rows.append(Row(case, "time", us, "us", ours * 1e6, ours * 1e6 / us))
        rate = executed(c, lists) / us / 1e6
        rows.append(Row(case, "executed", rate, "TFLOP/s"))
    return rows


def main() -> None:
    """Measures everything that was not skipped and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["forward", "fp8", "others", "flex"]
    )
    parser.add_argument("--cases", type=int, help="only so many, from the first")
    args = parser.parse_args()
    rows: list[Row] = []
    if "forward" not in args.skip:
        for c in QUICK if args.quick else CASES[: args.cases]:
            rows += forward(c)
            write("block_sparse_attention", rows, device_tag=args.tag)
    if "fp8" not in args.skip:
        for c in QUICK if args.quick else FLOAT8:
            rows += float8(c)
            write("block_sparse_attention", rows, device_tag=args.tag)
    if "others" not in args.skip:
        rows += others(QUICK[0] if args.quick else Case(16384, (0.25,)))
    if "flex" not in args.skip:
        rows += flex(QUICK[0] if args.quick else Case(32768, (0.5, 0.25, 0.1)))
    print(write("block_sparse_attention", rows, device_tag=args.tag))


if __name__ == "__main__":
    main()
