"""Block-sparse attention with FP8 keys and values, and its kernel for Hopper GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import (
    BlockLists,
    Float8KV,
    KernelError,
    block_sparse_attention,
    block_sparse_attention_fp8,
    quantize_kv,
)
from pallas_kernels.block_sparse_attention import _float8, mosaic_gpu_fp8
from tests.kernels._attention import oracle, random_lists, random_qkv
from tests.kernels._h100 import check_no_spills, has_plugin

F8 = np.dtype(ml_dtypes.float8_e4m3fn)


def _relative(got: Any, want: Any) -> float:
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def _scale(x: np.ndarray) -> float:
    """The least power of two that brings x within 448; 1 for zeros."""
    most = np.abs(x).max()
    return 2.0 ** np.ceil(np.log2(most / 448)) if most else 1.0


def _numbers(
    q: Any, k: Any, v: Any, smooth: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What q, k and v are rounded to, head by head, and the mean of k."""
    q, k, v = (np.asarray(x).astype(np.float32) for x in (q, k, v))
    q, k, v, mean = q.copy(), k.copy(), v.copy(), np.zeros_like(k[:, 0])

    def rounded(x: np.ndarray) -> np.ndarray:
        s = np.float32(_scale(x))
        return (x / s).astype(F8).astype(np.float32) * s

    for b in range(len(k)):
        for h in range(k.shape[2]):
            if smooth:
                mean[b, h] = k[b, :, h].mean(axis=0)
            k[b, :, h] = rounded(k[b, :, h] - mean[b, h])
            v[b, :, h] = rounded(v[b, :, h])
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                q[b, t, h] = rounded(q[b, t, h])
    return q, k, v, mean


def _outliers(rng: np.random.Generator, x: Any, share: float, size: float) -> Any:
    """A few channels with a large mean of their own."""
    shift = np.where(rng.random(x.shape[-1]) < share, size, 0.0)
    return (x + shift * rng.choice([-1, 1], x.shape[-1])).astype(x.dtype)


def test_numbers_and_scales() -> None:
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, 2, 5, 150, 2, 2, 32, jnp.bfloat16)
    k, v = k * 100, v.at[1, :, 0].set(0)
    kv = jax.jit(quantize_kv)(k, v)
    want_q, want_k, want_v, mean = _numbers(q, k, v)
    np.testing.assert_allclose(kv.k_mean, mean, atol=1e-4)
    # The mean differs in its last bits, which now and then rounds a key elsewhere.
    got = np.asarray(kv.centred_keys(jnp.float32))
    assert np.mean(got != want_k) < 1e-3
    assert _relative(got, want_k) < 1e-3
    np.testing.assert_array_equal(kv.values(), want_v)
    np.testing.assert_array_equal(kv.values(jnp.bfloat16).astype(jnp.float32), want_v)
    rows, scales = _float8.quantize_rows(q)
    rows = rows.astype(jnp.float32) * scales[..., None]
    np.testing.assert_array_equal(rows, want_q)
    assert kv.v_scale[1, 0] == 1


def test_padding_does_not_count() -> None:
    rng = np.random.default_rng(1)
    _, k, v = random_qkv(rng, 2, 8, 40, 1, 1, 32)
    lengths = jnp.asarray([40, 24])
    padded = quantize_kv(k.at[1, 24:].set(1e4), v.at[1, 24:].set(1e4), lengths=lengths)
    alone = quantize_kv(k[1:, :24], v[1:, :24])
    for got, want in ((padded.keys(), alone.keys()), (padded.values(), alone.values())):
        np.testing.assert_allclose(got[1, :24], want[0], rtol=1e-6, atol=1e-6)
    assert not padded.values()[1, 24:].any()


def test_threads_have_the_weights_in_the_order_of_the_values() -> None:
    """Fragments of `wgmma`, of the PTX ISA: m64n128 of f32, then m64k32 of 8 bits."""
    keys = 128
    slots = np.asarray(_float8.out_of_order(jnp.arange(keys)))
    np.testing.assert_array_equal(_float8.in_order(jnp.asarray(slots)), np.arange(keys))
    for lane in range(32):
        group, member = divmod(lane, 4)
        # The accumulator: registers 2 i and 2 i + 1 are neighbours in a row.
        pairs = np.empty((keys // 8, 2), dtype=object)
        for j, half in np.ndindex(pairs.shape):
            row, column = group + 8 * half, 8 * j + 2 * member
            pairs[j, half] = [(row, column), (row, column + 1)]
        operand = mosaic_gpu_fp8.merged(pairs, (64, keys), lambda a, b: a + b)
        registers = operand.reshape(keys // 32, 4)  # of one instruction each
        for n, words in enumerate(registers):
            for i, word in enumerate(words):
                row = group + 8 * (i % 2)
                first = 32 * n + 16 * (i // 2) + 4 * member
                assert word == [(row, slots[first + c]) for c in range(4)]


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_xla_computes_with_the_rounded_numbers(soft_cap: float | None) -> None:
    """Uneven tails, grouped queries, offsets and lengths of rows, an empty list."""
    rng = np.random.default_rng(2)
    q, k, v = random_qkv(rng, 2, 39, 53, 4, 2, 32)
    k = _outliers(rng, k, 0.1, 5.0)
    offset = jnp.asarray([14, 3])
    lists = random_lists(rng, 2, 4, 39, 53, 16, 8, 0.5, np.asarray(offset))
    smooth = soft_cap is None
    q8, k8, v8, mean = _numbers(q, k, v, smooth)
    want = oracle(q8, k8, v8, lists, q_offset=offset, soft_cap=soft_cap)
    shift = np.einsum("bthd,bhd->bht", np.asarray(q), np.repeat(mean, 2, axis=1))
    options = {"q_offset": offset, "soft_cap": soft_cap, "return_lse": True}
    for implementation in ("xla", "reference"):
        got = block_sparse_attention(
            q, k, v, lists, kv_dtype="float8_e4m3fn", implementation=implementation,
            **options,
        )  # fmt: skip
        np.testing.assert_allclose(got[0], want[0], atol=2e-3)
        np.testing.assert_allclose(got[1], want[1] + shift * 32**-0.5, atol=2e-3)
    kv = quantize_kv(k, v, smooth=smooth)
    again = block_sparse_attention_fp8(
        q, kv, lists, implementation="reference", **options
    )
    np.testing.assert_allclose(again[0], got[0], atol=1e-6)


def test_vmap_joins_the_batch() -> None:
    rng = np.random.default_rng(3)
    q, k, v = random_qkv(rng, 2, 32, 32, 2, 1, 32)
    lists = random_lists(rng, 1, 1, 32, 32, 16, 16, 1.0)

    def run(q: Any, k: Any, v: Any) -> Any:
        return block_sparse_attention(q, k, v, lists, kv_dtype="float8_e4m3fn")

    mapped = jax.vmap(run)(q[:, None], k[:, None], v[:, None])
    np.testing.assert_allclose(mapped[:, 0], run(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "most", "gain"), [("normal", 0.06, 0.9), ("outliers", 0.06, 2.0)]
)
def test_errors(kind: str, most: float, gain: float) -> None:
    """Root mean square errors, and what taking the mean off the keys gains.

    e4m3 rounds by 2^-4 at most, 2.6 % in the root mean square. Errors of q, k, v and
    the weights add up to 5 % of a result; bfloat16 has 0.3 %. Channels of the keys with
    a mean would double that, as it takes their bits.
    """
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(rng, 1, 512, 512, 2, 1, 64)
    if kind == "outliers":
        k, q = _outliers(rng, k, 0.06, 16.0), _outliers(rng, q, 0.06, 2.0)
    lists = random_lists(rng, 1, 2, 512, 512, 128, 128, 0.6)
    want = block_sparse_attention(q, k, v, lists, implementation="xla")

    def error(smooth: bool) -> float:
        kv = quantize_kv(k, v, smooth=smooth)
        got = block_sparse_attention_fp8(q, kv, lists, implementation="xla")
        return _relative(got, want)

    assert error(True) < most
    assert error(False) > gain * error(True)


def test_what_it_refuses() -> None:
    x = jnp.ones((1, 32, 2, 32))
    lists = random_lists(np.random.default_rng(0), 1, 1, 32, 32, 16, 16, 1.0)
    kv = quantize_kv(x, x)

    def run(x: Any, kv: Any = kv, **options: Any) -> Any:
        return block_sparse_attention_fp8(x, kv, lists, **options)

    with pytest.raises(KernelError, match="kv must be a Float8KV, not Array"):
        run(x, x)
    with pytest.raises(KernelError, match=r"kv.v must be float8_e4m3fn\[1, 2, 32, 128"):
        run(x, Float8KV(kv.k, kv.k, kv.k_scale, kv.v_scale, None))
    with pytest.raises(KernelError, match=r"quantize_kv\(..., smooth=False\)"):
        run(x, soft_cap=2.0)
    with pytest.raises(KernelError, match="kv_dtype must be None or 'float8_e4m3fn'"):
        block_sparse_attention(x, x, x, lists, kv_dtype="int8")
    for argument in range(3):
        with pytest.raises(KernelError, match="no gradient: .* kv_dtype=None"):
            jax.grad(
                lambda *x: block_sparse_attention(
                    *x, lists, kv_dtype="float8_e4m3fn"
                ).sum(),
                argument,
            )(x, x, x)


def _run(q: Any, kv: Float8KV, lists: BlockLists, q_offset: Any, **options: Any) -> Any:
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (q.shape[0],))
    settings = {"soft_cap": None, **options}
    return mosaic_gpu_fp8.attention(
        q, kv, lists, scale=q.shape[-1] ** -0.5, q_offset=offset, **settings
    )


def _check(got: Any, numbers: Any, lists: BlockLists, **options: Any) -> None:
    """Against attention over the rounded q, k and v, in float64.

    The kernel rounds weights to e4m3 as well, each by up to 2^-4 and 2.6 % in the root
    mean square; sums of many keep that, sums of few or with a mean have less. lse is of
    weights that are not rounded.
    """
    q8, k8, v8, _ = numbers
    y, lse = oracle(q8, k8, v8, lists, **options)
    assert _relative(got[0], y) < 0.035
    assert np.abs(np.asarray(got[0], np.float64) - y).max() < 0.07 * np.abs(v8).max()
    np.testing.assert_allclose(got[1], lse, atol=2e-3)


def _without(lists: BlockLists, row: int, block: int) -> BlockLists:
    counts = lists.counts.at[row, :, block].set(0)
    return BlockLists(lists.indices, counts, lists.block_q, lists.block_k)


def test_interpreted_kernel_agrees_with_the_oracle() -> None:
    """Uneven tails, unaligned offsets for each row, grouped queries, an empty list."""
    rng = np.random.default_rng(0)
    offset = np.asarray([77, 128])
    q, k, v = random_qkv(rng, 2, 150, 300, 2, 1, 64, jnp.bfloat16)
    lists = random_lists(rng, 2, 2, 150, 300, 128, 128, 0.5, offset)
    lists = _without(lists, 1, 0)
    got = _run(q, quantize_kv(k, v), lists, offset, interpret=True)
    _check(got, _numbers(q, k, v), lists, q_offset=offset)


def test_interpreted_kernel_with_narrow_blocks() -> None:
    """Blocks of 64 keys, lists for key heads, fewer stages, a soft cap."""
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(rng, 1, 128, 192, 2, 1, 32, jnp.float16)
    lists = random_lists(rng, 1, 1, 128, 192, 128, 64, 0.5, 64)
    kv = quantize_kv(k, v, smooth=False)
    got = _run(q, kv, lists, 64, interpret=True, stages=2, soft_cap=2.0)
    numbers = _numbers(q, k, v, smooth=False)
    _check(got, numbers, lists, q_offset=64, soft_cap=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 64}, "block_q 64 is no multiple of 128"),
        ({"block_k": 32}, "block_k 32 is no multiple of 64"),
        ({"dim": 80}, "head_dim 80 is no multiple of 32 up to 256"),
        ({"dtype": jnp.float32}, "bfloat16 and float16, not float32"),
    ],
)
def test_what_the_kernel_does_not_take(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "block_q": 128, "block_k": 128, "dim": 64, "dtype": jnp.bfloat16, **change,
    }  # fmt: skip
    x = jax.ShapeDtypeStruct((1, 128, 2, settings["dim"]), settings["dtype"])
    sizes = settings["block_q"], settings["block_k"]
    lists = BlockLists(
        jnp.zeros((1, 1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), int), *sizes
    )
    kv = jax.eval_shape(quantize_kv, x, x)
    assert message in str(mosaic_gpu_fp8.unsupported(x, kv, lists))


GPU_CASES = [
    # batch, T, S, heads, kv heads, dim, block_k, list heads, density, offset, soft cap
    (1, 1024, 1024, 8, 2, 128, 128, 8, 0.4, 0, None),
    (2, 1000, 1300, 7, 1, 128, 128, 7, 0.4, 77, None),
    (1, 2048, 2048, 8, 8, 128, 128, 1, 0.0, 0, None),
    (1, 2048, 2048, 4, 4, 128, 256, 4, 1.0, 0, None),
    (3, 40, 300, 2, 2, 128, 128, 2, 0.4, 200, None),
    (1, 1024, 1024, 4, 2, 64, 64, 2, 0.3, 0, None),
    (1, 512, 512, 4, 2, 96, 128, 4, 0.4, 0, 20.0),
    (1, 640, 640, 4, 2, 256, 128, 4, 0.4, 0, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_on_the_device(case: tuple[Any, ...], kind: str) -> None:
    batch, t, s, heads, kv_heads, dim, block_k, of, density, offset, cap = case
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, batch, t, s, heads, kv_heads, dim, jnp.dtype(kind))
    lists = random_lists(rng, batch, of, t, s, 128, block_k, density, offset)
    if batch > 1:
        lists = _without(lists, 1, 0)
    kv = jax.jit(lambda k, v: quantize_kv(k, v, smooth=False))(k, v)
    run = jax.jit(
        lambda q, kv, lists: block_sparse_attention_fp8(
            q,
            kv,
            lists,
            q_offset=offset,
            soft_cap=cap,
            return_lse=True,
            implementation="mosaic_gpu",
        )
    )
    got, again = run(q, kv, lists), run(q, kv, lists)
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    numbers = _numbers(q, k, v, smooth=False)
    _check(got, numbers, lists, q_offset=offset, soft_cap=cap)


@pytest.mark.gpu
def test_sums_do_not_drift_on_the_device() -> None:
    """All weights and values alike: any loss in the sums of 8192 keys would show."""
    shape = (1, 8192, 1, 128)
    q, k = jnp.zeros(shape, jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)
    blocks = 8192 // 128
    mask = jnp.tril(jnp.ones((1, 1, blocks, blocks), bool))
    lists = BlockLists.from_mask(mask, block_q=128, block_k=128)
    y = block_sparse_attention_fp8(
        q, quantize_kv(k, 1.25 * k), lists, implementation="mosaic_gpu"
    )
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.25, rtol=2**-8)


_SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from tests.kernels._h100 import compile_for_h100
from pallas_kernels import BlockLists, quantize_kv
from pallas_kernels.block_sparse_attention import mosaic_gpu_fp8

kind, dim, block_k, list_heads, soft_cap, tuning = json.loads(sys.argv[1])
q = jax.ShapeDtypeStruct((2, 1000, 8, dim), jnp.dtype(kind))
k = jax.ShapeDtypeStruct((2, 1400, 2, dim), jnp.dtype(kind))
shape = (2, list_heads, 8)
lists = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((*shape, 9), shape, (2,))]

def attend(q, k, v, indices, counts, offset):
    kv = quantize_kv(k, v)
    return mosaic_gpu_fp8.attention(
        q, kv, BlockLists(indices, counts, 128, block_k), scale=1.0, q_offset=offset,
        soft_cap=soft_cap, **tuning,
    )

compile_for_h100(attend, q, k, k, *lists)
"""

CASES = [
    ("bfloat16", 128, 128, 8, None, {}),
    ("float16", 128, 256, 2, 30.0, {"stages": 2}),
    ("bfloat16", 64, 64, 1, None, {}),
    ("bfloat16", 96, 128, 8, None, {"promote": False}),
    ("bfloat16", 256, 128, 8, None, {}),
]


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_an_h100_without_spills(case: tuple, tmp_path: Path) -> None:
    check_no_spills(_SCRIPT, case, tmp_path)
