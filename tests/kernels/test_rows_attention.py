"""Attention on a row cache against a transcription in numpy, and for an H100."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, rows_attention
from pallas_kernels._devices import elsewhere
from pallas_kernels.rows_attention import Held
from pallas_kernels.rows_attention._case import LANES, Case
from pallas_kernels.rows_attention._gather import gather
from pallas_kernels.rows_attention._warps import attend_part
from tests.kernels import _simt
from tests.kernels._h100 import check_no_spills, has_plugin

BF16 = jnp.bfloat16
B, T, H, HKV, D, S, R = 2, 7, 6, 2, 64, 600, 3


def inputs(dtype: Any) -> dict[str, Any]:
    """Rows at different places, a tree of tokens, entries to be put in place."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape).astype(dtype)

    # The second row's new entries, and what is held, lie on both sides of slot 576.
    slots = np.asarray([9, 577], np.int32)
    depth = np.asarray([0, 1, 1, 2, 2, 3, 3])
    parents = [-1, 0, 0, 1, 2, 3, 3]
    mask = np.zeros((B, 1, T, S), bool)
    for b in range(B):
        for t in range(T):
            mask[b, 0, t, : slots[b]] = True
            node = t
            while node >= 0:
                mask[b, 0, t, slots[b] + node] = True
                node = parents[node]
    angle = (slots[:, None] + depth)[..., None] * 0.6 ** np.arange(D // 2)
    return dict(
        qkv=normal(B, T, (H + 2 * HKV) * D),
        cos=jnp.asarray(np.cos(angle), jnp.float32),
        sin=jnp.asarray(np.sin(angle), jnp.float32),
        mask=jnp.asarray(mask),
        slots=jnp.asarray(slots),
        k=normal(B, HKV, S, D),
        v=normal(B, HKV, S, D),
        held=Held(normal(B, HKV, R, D), normal(B, HKV, R, D), jnp.asarray([0, 3])),
        q_norm=normal(D),
        k_norm=normal(D),
    )


def oracle(
    *, qkv, cos, sin, mask, slots, k, v, held=None, q_norm=None, k_norm=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head of one token at a time, in float64."""
    wide = functools.partial(np.asarray, dtype=np.float64)
    qkv, cos, sin = wide(qkv), wide(cos), wide(sin)
    k, v, half = wide(k).copy(), wide(v).copy(), D // 2
    tokens = qkv.shape[1]
    y = np.zeros((B, tokens, H * D))

    def turned(x, b, t, norm):
        if norm is not None:
            x = x / np.sqrt(np.mean(x**2) + 1e-6) * wide(norm)
        out = np.zeros(D)
        for i in range(half):
            c, s = cos[b, t, i], sin[b, t, i]
            out[i] = x[i] * c - x[i + half] * s
            out[i + half] = x[i + half] * c + x[i] * s
        return out

    for b in range(B):
        at = int(slots[b])
        if held is not None:
            for r in range(int(held.valid[b])):
                k[b, :, at - int(held.valid[b]) + r] = wide(held.k)[b, :, r]
                v[b, :, at - int(held.valid[b]) + r] = wide(held.v)[b, :, r]
        heads = qkv[b].reshape(tokens, -1, D)
        for t in range(tokens):
            for h in range(HKV):
                k[b, h, at + t] = turned(heads[t, H + h], b, t, k_norm)
                v[b, h, at + t] = heads[t, H + HKV + h]
        for t in range(tokens):
            for h in range(H):
                q, group = turned(heads[t, h], b, t, q_norm), h // (H // HKV)
                logits = k[b, group] @ q / np.sqrt(D)
                seen = np.asarray(mask)[b, 0, t]
                weights = np.where(seen, np.exp(logits - logits[seen].max()), 0)
                y[b, t, h * D : (h + 1) * D] = weights @ v[b, group] / weights.sum()
    return y, k, v


@functools.partial(jax.jit, static_argnames="name")
def run(args: dict[str, Any], name: str) -> Any:
    return rows_attention(**args, implementation=name)


def emulated(args: dict[str, Any], runs: int = 1, tiles: int = 1) -> Any:
    """What the threads of the kernels make of it, on numpy arrays."""
    tokens = args["qkv"].shape[1]
    held, norms = args.get("held"), [args[x] for x in ("q_norm", "k_norm") if x in args]
    case = Case(
        *(B, tokens, H, HKV, D, S, R if held else 0, bool(norms), 1e-6, runs, tiles)
    )
    slots = np.asarray(args["slots"])
    k, v = (np.array(args[x]) for x in "kv")
    count = B * HKV * case.splits * case.rows
    parts, stats = (np.full((count, n), np.nan, np.float32) for n in (D, 2))
    mask = np.asarray(args["mask"])[:, 0].astype(np.int8)
    given = [np.asarray(args[x]) for x in ("qkv", "cos", "sin")] + [mask, slots, k, v]
    more = [np.asarray(a) for a in (*(held or ()), *norms)]
    _simt.run(
        attend_part,
        case,
        grid=case.grid,
        threads=LANES,
        smem_words=case.smem_words,
        arrays=[*given, *more, parts, stats],
    )
    y = np.zeros((B, tokens, H * D), BF16)
    _simt.run(
        lambda asm, c, *refs: gather(asm, c, *refs[:-1]),
        case,
        grid=case.gather_grid,
        threads=LANES,
        smem_words=1,
        arrays=[parts, stats, slots, y],
    )
    return y, k, v


def first(args: dict[str, Any], count: int) -> dict[str, Any]:
    """The same with the first tokens only."""
    part = {x: args[x][:, :count] for x in ("qkv", "cos", "sin")}
    return {**args, **part, "mask": args["mask"][:, :, :count]}


def check(args: dict[str, Any], got: Any, bound: float, held: int) -> None:
    for found, want in zip(got, oracle(**args), strict=True):
        error = np.abs(np.asarray(found, np.float64) - want).max()
        assert error < bound * max(1, np.abs(want).max())
    # Nothing but the new entries is written.
    for row, at in enumerate(np.asarray(args["slots"])):
        kept = np.ones(S, bool)
        kept[at - (held if row else 0) : at + args["qkv"].shape[1]] = False
        for found, before in zip(got[1:], (args["k"], args["v"]), strict=True):
            a, b = (np.asarray(x, np.float32)[row, :, kept] for x in (found, before))
            assert np.array_equal(a, b)


def without(args: dict[str, Any]) -> dict[str, Any]:
    return {x: args[x] for x in args if x not in ("held", "q_norm", "k_norm")}


@pytest.mark.parametrize(("dtype", "full"), [(jnp.float32, True), (BF16, False)])
def test_it_is_attention(dtype: Any, full: bool) -> None:
    args = inputs(dtype) if full else without(inputs(dtype))
    got = run(args, "xla")
    assert all(x.dtype == dtype for x in got)
    check(args, got, 3e-6 if dtype == jnp.float32 else 2e-2, R * full)


@pytest.mark.parametrize(
    ("full", "runs", "tiles"), [(True, 1, 1), (True, 2, 3), (False, 1, 2)]
)
def test_the_kernel_is_attention(full: bool, runs: int, tiles: int) -> None:
    args = inputs(BF16) if full else without(inputs(BF16))
    check(args, emulated(args, runs, tiles), 2e-2, R * full)


def test_a_token_does_not_depend_on_others() -> None:
    args = inputs(BF16)
    whole = emulated(args)
    for count in (1, 3):
        y, *caches = emulated(first(args, count))
        assert np.array_equal(y, whole[0][:, :count])
        for a, b in zip(caches, whole[1:], strict=True):
            for row, at in enumerate(np.asarray(args["slots"])):
                end = at + count
                assert np.array_equal(a[row, :, :end], b[row, :, :end])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": jnp.ones((B, 17, (H + 2 * HKV) * D))}, "1 to 16"),
        ({"qkv": jnp.ones((B, T, 5 * D))}, "multiple of 2"),
        ({"qkv": jnp.ones((B, T, 320), jnp.int8)}, "int8"),
        ({"mask": jnp.ones((B, T, S), bool)}, r"mask must have shape \[2, 1, 7, 600\]"),
        ({"slots": jnp.zeros(3, jnp.int32)}, r"slots must have shape \[2\]"),
        ({"k_norm": None}, "both or none"),
        ({"v": jnp.ones((B, HKV, S, 48))}, "k and v"),
        ({"k": jnp.ones((B, 2, S, 40)), "v": jnp.ones((B, 2, S, 40))}, "powers of two"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        rows_attention(**{**inputs(jnp.float32), **change})


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from pallas_kernels import rows_attention
from pallas_kernels.rows_attention import Held
from tests.kernels._h100 import compile_for_h100

heads, kv_heads, dim, tokens, held, slots = json.loads(sys.argv[1])
shape, bf16 = jax.ShapeDtypeStruct, jnp.bfloat16
cache = shape((1, kv_heads, slots, dim), bf16)
turn = shape((1, tokens, dim // 2), jnp.float32)
rows = shape((1, kv_heads, held, dim), bf16)

def rounds(qkv, cos, sin, mask, k, v, ahead):
    def one(i, carry):
        y, k, v = carry
        at = jnp.reshape(tokens * i + held, 1).astype(jnp.int32)
        y = jnp.concatenate([y, qkv[..., y.shape[-1] :]], axis=-1)
        more = Held(*ahead, at // 2) if held else None
        return rows_attention(y, cos, sin, mask, at, k, v, held=more)

    y = qkv[..., : heads * dim]
    return jax.lax.fori_loop(0, 50, one, (y, k + 1, v + 1))[0]

compiled = compile_for_h100(
    rounds,
    shape((1, tokens, (heads + 2 * kv_heads) * dim), bf16),
    *(turn, turn, shape((1, 1, tokens, slots), jnp.bool_), cache, cache, (rows, rows)),
)
copied = f"bf16[1,{kv_heads},{slots},{dim}]"
lines = [x for x in compiled.as_text().splitlines() if " copy(" in x]
assert not [x for x in lines if copied in x], lines
size = cache.size * cache.dtype.itemsize
parts = 4 * heads * max(tokens, 16) * dim * (slots // 64)
assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * size + parts + 2**20
"""


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize(
    "case",
    [
        *((9, 3, 64, 8, 0, 960), (9, 3, 64, 16, 8, 960), (32, 8, 128, 16, 0, 960)),
        *((28, 4, 128, 1, 0, 960), (32, 8, 128, 16, 8, 8192), (9, 3, 64, 16, 8, 8192)),
    ],
)
def test_an_h100_updates_the_cache_in_place_without_spills(
    case: Any, tmp_path: Path
) -> None:
    check_no_spills(_COMPILE, case, tmp_path)


@pytest.mark.gpu
def test_a_gpu_computes_it() -> None:
    if why := elsewhere("mosaic_gpu"):
        pytest.skip(why)
    args = inputs(BF16)
    whole = run(args, "mosaic_gpu")
    check(args, whole, 2e-2, R)
    for count in (1, 3):
        one = np.asarray(run(first(args, count), "mosaic_gpu")[0], np.float32)
        assert np.array_equal(one, np.asarray(whole[0], np.float32)[:, :count])
