"""Block-sparse attention on TPUs: numbers in Pallas' interpret mode, the choice between
its two kernels, lowering from a CPU, and with `-m tpu_compile` the TPU's compiler.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from benchmarks.tpu_bundles import GENERATIONS, count
from pallas_kernels import BlockLists, block_sparse_attention
from pallas_kernels.block_sparse_attention import tpu
from tests.kernels import _attention


def _case(
    t: int, s: int, heads: tuple[int, int, int], blocks: tuple[int, int], offsets: Any
) -> tuple[Any, BlockLists]:
    """q, k, v of two rows and 16 channels, and lists; `heads` are of q, k and lists.

    One list is empty, one lacks the block of its own queries, and what no list of a
    head names is NaN.
    """
    rng = np.random.default_rng(0)
    q, k, v = (np.array(x) for x in _attention.random_qkv(rng, 2, t, s, *heads[:2], 16))
    rows = 1 if len(set(offsets)) == 1 else 2
    lists = _attention.random_lists(
        rng, rows, heads[2], t, s, *blocks, 0.6, offsets[:rows]
    )
    counts = lists.counts.at[-1, 0, 0].set(0).at[0, -1, -1].add(-1)
    lists = BlockLists(lists.indices, counts, *blocks)
    mask = np.asarray(lists.to_mask(-(-s // blocks[1]))).any(2)
    for b in range(2):
        for h in range(heads[1]):
            mine = np.arange(heads[0]) * heads[2] // heads[0]
            mine = mine[h * heads[0] // heads[1] : (h + 1) * heads[0] // heads[1]]
            named = mask[b % rows, mine].any(0)
            for j in np.flatnonzero(~named):
                k[b, j * blocks[1] : (j + 1) * blocks[1], h] = np.nan
                v[b, j * blocks[1] : (j + 1) * blocks[1], h] = np.nan
    return (q, k, v), lists


CASES: dict[str, tuple[Any, ...]] = {
    # q_length, k_length, heads, blocks, offsets; soft_cap; what runs
    "lists for each key head": (
        (40, 110, (4, 2, 2), (32, 16), (37, 70)), None, tpu.Plan(2, 8, False),
    ),
    "lists for each query head": (
        (40, 40, (2, 1, 2), (16, 16), (0, 0)), 2.0, tpu.Plan(1, 2, False),
    ),
    "large blocks": (
        (20, 1100, (2, 1, 1), (16, 1024), (1060, 5)), None, tpu.Plan(2, 1, True),
    ),
}  # fmt: skip


def _check(y: Any, lse: Any, want: Any, most: float) -> None:
    blind = np.isinf(want[1])
    assert blind.any() and np.array_equal(np.isinf(lse), blind)
    y, lse = np.asarray(y, np.float32), np.asarray(lse)
    assert not y[blind.swapaxes(1, 2)].any()
    assert np.abs(y - want[0]).max() < most
    assert np.abs(lse[~blind] - want[1][~blind]).max() < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_both_kernels_equal_the_oracle(name: str) -> None:
    case, soft_cap, plan = CASES[name]
    (q, k, v), lists = _case(*case)
    assert tpu.plan(q, k, lists) == plan and tpu.unsupported(q, k, v, lists) is None
    options: dict[str, Any] = dict(scale=0.3, soft_cap=soft_cap)

    @jax.jit
    def f(q: Any, k: Any, v: Any, lists: BlockLists) -> Any:
        offsets = jnp.asarray(case[-1], jnp.int32)
        return tpu.attention(q, k, v, lists, q_offset=offsets, **options)

    want = _attention.oracle(q, k, v, lists, q_offset=case[-1], **options)
    _check(*f(q, k, v, lists), want, 2e-6)


def test_copies_are_waited_for() -> None:
    # This interpreter copies when it is waited for, into memory that is NaN.
    (q, k, v), lists = _case(20, 60, (2, 2, 1), (16, 16), (30, 40))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    assert tpu.plan(q, k, lists) == tpu.Plan(1, 4, False)
    run = functools.partial(
        tpu.attention,
        scale=0.3,
        q_offset=jnp.asarray((30, 40), jnp.int32),
        soft_cap=None,
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    y, lse = jax.jit(run)(q, k, v, lists)
    want = _attention.oracle(q, k, v, lists, q_offset=(30, 40), scale=0.3)
    _check(y, lse, want, 3e-2)


def _shapes(
    t: int, heads: tuple[int, int, int], dim: int, blocks: tuple[int, int], width: int
) -> tuple[Any, Any, Any, BlockLists]:
    q, k = (jax.ShapeDtypeStruct((1, t, h, dim), jnp.bfloat16) for h in heads[:2])
    counts = jax.ShapeDtypeStruct((1, heads[2], -(-t // blocks[0])), jnp.int32)
    indices = jax.ShapeDtypeStruct((*counts.shape, width), jnp.int32)
    return q, k, k, BlockLists(indices, counts, *blocks)


@pytest.mark.parametrize(
    ("shapes", "plan"),
    [
        # 128k tokens: the lists would take 4.6 or 18 MB of scalar memory.
        (_shapes(2**17, (32, 8, 8), 128, (128, 128), 140), tpu.Plan(4, 8, False)),
        (_shapes(2**17, (32, 8, 32), 128, (128, 128), 140), tpu.Plan(1, 8, False)),
        (_shapes(2**17, (32, 8, 32), 128, (512, 1024), 40), tpu.Plan(1, 1, False)),
        (_shapes(2**15, (32, 8, 8), 128, (256, 1024), 8), tpu.Plan(2, 1, True)),
        (_shapes(2**15, (32, 1, 1), 256, (128, 128), 24), tpu.Plan(8, 4, False)),
        (_shapes(2**15, (32, 8, 8), 64, (64, 64), 3), tpu.Plan(4, 4, False)),
    ],
)
def test_the_plan_fits_in_memory(shapes: Any, plan: tpu.Plan) -> None:
    q, k, _, lists = shapes
    assert tpu.plan(q, k, lists) == plan
    assert tpu._vmem(q, lists, plan.heads, plan.gather) <= 12 * 2**20


@pytest.mark.parametrize(
    ("dim", "blocks", "clause"),
    [
        (64, (8, 64), "lists.block_q is 8 (it takes multiples of 16)"),
        (64, (64, 100), "lists.block_k is 100 (it takes multiples of 16)"),
        (
            128,
            (2048, 1024),
            "blocks of 2048 x 1024 with heads of 128 channels take 28 MiB of vector "
            "memory (it has 12)",
        ),
    ],
)
def test_what_is_left_out_has_a_reason(dim: int, blocks: Any, clause: str) -> None:
    assert tpu.unsupported(*_shapes(4096, (8, 2, 2), dim, blocks, 8)) == clause


@pytest.mark.parametrize("blocks", [(128, 128), (128, 1024)])
def test_lowers_for_a_tpu_from_a_cpu(blocks: Any) -> None:
    device = jax.sharding.AbstractDevice(
        device_kind="TPU v5 lite", num_cores=1, platform="tpu"
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        # Nothing is named: a TPU takes this by itself.
        traced = jax.jit(block_sparse_attention).trace(
            *_shapes(2048, (8, 2, 2), 128, blocks, 8)
        )
        lowered = traced.lower(lowering_platforms=("tpu",))
    kind = "gather" if blocks == (128, 128) else "blocks"
    assert f"block_sparse_attention_{kind}" in lowered.as_text()


_BASE = dict(
    format="attention", t=1024, s=8192, heads=4, kv_heads=1, list_heads=1, dim=128,
    blocks=(128, 128), width=24,
)  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {"heads": 8, "kv_heads": 2, "list_heads": 8, "dim": 64, "blocks": (64, 64)},
    {"t": 100, "s": 300, "heads": 2, "dim": 80, "soft_cap": 20.0, "width": 3},
    {"kv_heads": 4, "list_heads": 4, "dtype": "float32", "blocks": (256, 1024)},
    {"heads": 7, "dim": 256, "dtype": "float16", "blocks": (16, 16)},
    # As much of the vector memory as a plan may use.
    {"heads": 2, "dim": 384, "blocks": (256, 1024), "width": 4},
]
# Bundles of the first case; most of them are two tiles of 512 x 1024 logits.
BOUNDS = {"v5e": 6400, "v6e": 4700, "v7x": 4650}


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_tpu_takes_every_kernel(generation: str) -> None:
    found = count(generation, [_BASE, *({**_BASE, **other} for other in OTHERS)])
    assert min(found) > 0 and found[0] <= BOUNDS[generation], found
