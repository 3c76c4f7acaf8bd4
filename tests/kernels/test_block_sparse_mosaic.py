"""The Hopper kernel of block-sparse attention: interpreted here, run with `-m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockLists, KernelError, block_sparse_attention
from pallas_kernels.block_sparse_attention import mosaic_gpu
from tests.kernels._attention import oracle, random_lists, random_qkv
from tests.kernels._h100 import check_no_spills, has_plugin


def _run(
    q: Any, k: Any, v: Any, lists: BlockLists, q_offset: Any = 0, **options: Any
) -> Any:
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (q.shape[0],))
    scale = q.shape[-1] ** -0.5
    settings = {"soft_cap": None, **options}
    return mosaic_gpu.attention(
        q, k, v, lists, scale=scale, q_offset=offset, **settings
    )


def _check(got: Any, want: Any) -> None:
    y, lse = (np.asarray(x, np.float64) for x in got)
    # Outputs are rounded to 16 bits, and so are weights before they meet the values.
    np.testing.assert_allclose(y, want[0], atol=2e-2)
    assert np.mean(np.abs(y - want[0])) < 5e-3 * np.mean(np.abs(want[0])) + 1e-9
    np.testing.assert_allclose(lse, want[1], atol=1e-3)


def _without(lists: BlockLists, row: int, block: int) -> BlockLists:
    """Lists of which one is empty, for all heads."""
    counts = lists.counts.at[row, :, block].set(0)
    return BlockLists(lists.indices, counts, lists.block_q, lists.block_k)


def test_interpreted_kernel_agrees_with_the_oracle() -> None:
    """Uneven tails, unaligned offsets for each row, grouped queries, an empty list."""
    rng = np.random.default_rng(0)
    offset = np.asarray([77, 128])
    q, k, v = random_qkv(rng, 2, 150, 300, 2, 1, 64, jnp.bfloat16)
    lists = random_lists(rng, 2, 2, 150, 300, 128, 128, 0.5, offset)
    lists = _without(lists, 1, 0)
    got = _run(q, k, v, lists, offset, interpret=True)
    _check(got, oracle(q, k, v, lists, q_offset=offset))


def test_interpreted_kernel_with_narrow_blocks() -> None:
    """Blocks of 64 keys, lists for key heads, more stages, a soft cap."""
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(rng, 1, 128, 192, 2, 1, 16, jnp.float16)
    lists = random_lists(rng, 1, 1, 128, 192, 128, 64, 0.5, 64)
    options = {"stages": 3, "soft_cap": 2.0}
    got = _run(q, k, v, lists, 64, interpret=True, **options)
    _check(got, oracle(q, k, v, lists, q_offset=64, soft_cap=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 64}, "block_q 64 is no multiple of 128"),
        ({"block_k": 32}, "block_k 32 is no multiple of 64"),
        ({"dim": 72}, "head_dim 72 is no multiple of 16 up to 256"),
        ({"dtype": jnp.float32}, "bfloat16 and float16, not float32"),
    ],
)
def test_what_it_does_not_take(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "block_q": 128, "block_k": 128, "dim": 64, "dtype": jnp.bfloat16, **change,
    }  # fmt: skip
    x = jax.ShapeDtypeStruct((1, 128, 2, settings["dim"]), settings["dtype"])
    sizes = settings["block_q"], settings["block_k"]
    lists = BlockLists(
        jnp.zeros((1, 1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), int), *sizes
    )
    assert message in str(mosaic_gpu.unsupported(x, x, x, lists))


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="a message for other devices"
)
def test_it_names_what_runs_elsewhere() -> None:
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    lists = random_lists(np.random.default_rng(0), 1, 1, 128, 128, 128, 128, 1.0)
    with pytest.raises(KernelError, match="Hopper GPUs.*'xla' or implementation='ref"):
        block_sparse_attention(x, x, x, lists, implementation="mosaic_gpu")


GPU_CASES = [
    # batch, T, S, heads, kv heads, dim, block_k, list heads, density, offset, soft cap
    (1, 1024, 1024, 8, 2, 128, 128, 8, 0.4, 0, None),
    (2, 1000, 1300, 7, 1, 128, 128, 7, 0.4, 77, None),
    (1, 2048, 2048, 8, 8, 128, 128, 1, 0.0, 0, None),
    (1, 2048, 2048, 4, 4, 128, 128, 4, 1.0, 0, None),
    (3, 40, 300, 2, 2, 128, 128, 2, 0.4, 200, None),
    (1, 1024, 1024, 4, 2, 64, 64, 2, 0.3, 0, None),
    (1, 512, 512, 4, 2, 80, 128, 4, 0.4, 0, 20.0),
    (1, 512, 512, 4, 2, 96, 256, 4, 0.4, 0, None),
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
    run = jax.jit(
        lambda *x: block_sparse_attention(
            *x,
            q_offset=offset,
            soft_cap=cap,
            return_lse=True,
            implementation="mosaic_gpu",
        )
    )
    got = run(q, k, v, lists)
    again = run(q, k, v, lists)
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    _check(got, oracle(q, k, v, lists, q_offset=offset, soft_cap=cap))


_SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from tests.kernels._h100 import compile_for_h100
from pallas_kernels import BlockLists
from pallas_kernels.block_sparse_attention import mosaic_gpu

kind, dim, block_k, list_heads, soft_cap, tuning = json.loads(sys.argv[1])
q = jax.ShapeDtypeStruct((2, 1000, 8, dim), jnp.dtype(kind))
k = jax.ShapeDtypeStruct((2, 1400, 2, dim), jnp.dtype(kind))
shape = (2, list_heads, 8)
lists = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((*shape, 9), shape, (2,))]

def attend(q, k, v, indices, counts, offset):
    return mosaic_gpu.attention(
        q, k, v, BlockLists(indices, counts, 128, block_k), scale=1.0, q_offset=offset,
        soft_cap=soft_cap, **tuning,
    )

compile_for_h100(attend, q, k, k, *lists)
"""

CASES = [
    ("bfloat16", 128, 128, 8, None, {}),
    ("float16", 128, 256, 2, 30.0, {}),
    ("bfloat16", 64, 64, 1, None, {"stages": 4}),
    ("bfloat16", 80, 128, 8, None, {}),
    ("bfloat16", 96, 128, 8, None, {"stages": 3}),
    ("bfloat16", 256, 128, 8, None, {}),
]


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_an_h100_without_spills(case: tuple, tmp_path: Path) -> None:
    # 256 columns leave two registers too few before and after the loop.
    check_no_spills(_SCRIPT, case, tmp_path, most=12 if case[1] == 256 else 0)
