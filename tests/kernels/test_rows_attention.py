"""Attention on a row cache against a transcription in numpy, and for an H100."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, rows_attention
from pallas_kernels._pallas_triton import unsupported
from pallas_kernels.rows_attention import Held
from pallas_kernels.rows_attention._blocks import Blocks
from tests.kernels._h100 import compile_for_h100, has_plugin

TILES = Blocks(16, 4, 2)
BF16 = jnp.bfloat16
# JAX announces that kernels of Pallas will no longer be lowered to Triton one day.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
B, T, H, HKV, D, S, R = 2, 5, 6, 2, 32, 40, 3


def inputs(dtype: Any) -> dict[str, Any]:
    """Rows at different places, a tree of tokens, entries to be put in place."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape).astype(dtype)

    slots = np.asarray([9, 31], np.int32)
    depth = np.asarray([0, 1, 1, 2, 2])
    parents = [-1, 0, 0, 1, 2]
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
        held=Held(normal(B, HKV, R, D), normal(B, HKV, R, D), jnp.asarray([2, 0])),
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


@functools.partial(jax.jit, static_argnames=("name", "tiles"))
def run(args: dict[str, Any], name: str, tiles: Any = TILES) -> Any:
    return rows_attention(**args, implementation=name, tiles=tiles)


def first(args: dict[str, Any], count: int) -> dict[str, Any]:
    """The same with the first tokens only."""
    part = {x: args[x][:, :count] for x in ("qkv", "cos", "sin")}
    return {**args, **part, "mask": args["mask"][:, :, :count]}


@pytest.mark.parametrize("name", ["interpret", "xla"])
@pytest.mark.parametrize(("dtype", "full"), [(jnp.float32, True), (BF16, False)])
def test_it_is_attention(name: str, dtype: Any, full: bool) -> None:
    args = inputs(dtype)
    if not full:
        args = {x: args[x] for x in args if x not in ("held", "q_norm", "k_norm")}
    bound = 3e-6 if dtype == jnp.float32 else 2e-2
    got = run(args, name)
    for found, want in zip(got, oracle(**args), strict=True):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, np.float64) - want).max()
        assert error < bound * max(1, np.abs(want).max())
    # Nothing but the new entries is written.
    before = np.asarray(args["k"], np.float32)
    kept = np.ones(S, bool)
    kept[int(args["slots"][0]) - 2 * full : int(args["slots"][0]) + T] = False
    assert np.array_equal(
        np.asarray(got[1], np.float32)[0, :, kept], before[0, :, kept]
    )


def test_a_token_does_not_depend_on_others() -> None:
    args = inputs(BF16)
    whole = run(args, "interpret")
    for count in (1, 3):
        found = run(first(args, count), "interpret")
        for a, b in zip(found, whole, strict=True):
            # Rows of the result; entries of the cache that both have written.
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            if a.shape[1] == count:
                assert np.array_equal(a, b[:, :count])
            else:
                for row, at in enumerate(np.asarray(args["slots"])):
                    end = at + count
                    assert np.array_equal(a[row, :, :end], b[row, :, :end])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": jnp.ones((B, 17, (H + 2 * HKV) * D))}, "1 to 16"),
        ({"qkv": jnp.ones((B, T, 5 * D))}, "multiple of 2"),
        ({"qkv": jnp.ones((B, T, 320), jnp.int8)}, "int8"),
        ({"mask": jnp.ones((B, T, S), bool)}, r"mask must have shape \[2, 1, 5, 40\]"),
        ({"slots": jnp.zeros(3, jnp.int32)}, r"slots must have shape \[2\]"),
        ({"k_norm": None}, "both or none"),
        ({"v": jnp.ones((B, HKV, S, 48))}, "k and v"),
        ({"k": jnp.ones((B, 2, S, 40)), "v": jnp.ones((B, 2, S, 40))}, "powers of two"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        rows_attention(**{**inputs(jnp.float32), **change})


_SIZES = [(9, 3, 64, 8, BF16), (32, 8, 128, 16, BF16), (28, 4, 128, 1, BF16)]


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "dtype"),
    [*_SIZES, (9, 3, 64, 8, jnp.float32)],
)
def test_an_h100_updates_the_cache_in_place_without_spills(
    heads: int, kv_heads: int, dim: int, tokens: int, dtype: Any
) -> None:
    shape = jax.ShapeDtypeStruct
    cache = shape((1, kv_heads, 960, dim), dtype)
    turn = shape((1, tokens, dim // 2), jnp.float32)

    def rounds(qkv: Any, cos: Any, sin: Any, mask: Any, k: Any, v: Any) -> Any:
        def one(i: jax.Array, carry: Any) -> Any:
            y, k, v = carry
            slots = jnp.reshape(tokens * i, 1).astype(jnp.int32)
            y = jnp.concatenate([y, qkv[..., y.shape[-1] :]], axis=-1)
            return rows_attention(y, cos, sin, mask, slots, k, v)

        y = qkv[..., : heads * dim]
        return jax.lax.fori_loop(0, 50, one, (y, k + 1, v + 1))[0]

    compiled = compile_for_h100(
        rounds,
        shape((1, tokens, (heads + 2 * kv_heads) * dim), dtype),
        *(turn, turn, shape((1, 1, tokens, 960), jnp.bool_), cache, cache),
        xla_gpu_fail_ptx_compilation_on_register_spilling=True,
    )
    text = compiled.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    size = cache.size * cache.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, jnp.float32])
def test_a_gpu_computes_it(dtype: Any) -> None:
    if why := unsupported():
        pytest.skip(why)
    args = inputs(dtype)
    want = oracle(**args)
    got = run(args, "triton", None)
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    for found, other in zip(got, want, strict=True):
        error = np.abs(np.asarray(found, np.float64) - other).max()
        assert error < bound * max(1, np.abs(other).max())
    for count in (1, 3):
        one = np.asarray(run(first(args, count), "triton", None)[0], np.float32)
        assert np.array_equal(one, np.asarray(got[0], np.float32)[:, :count])
