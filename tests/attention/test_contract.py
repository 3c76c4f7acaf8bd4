"""What every selector promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import Hybrid, Place, Selector, selector, selector_names
from pallas_kernels import BlockLists
from tests.attention._data import structured

BLOCK, HEADS, KV_HEADS = 16, 4, 2
BLOCKS = 9
TOKENS = BLOCKS * BLOCK - 7
LENGTHS = TOKENS, 50
STEP = 3 * BLOCK
_STEM = dict(stride=4, sink_blocks=1, window_blocks=2, dense_layers=0)

CASES: dict[str, dict[str, Any]] = {
    "a_shape": dict(sink_tokens=20, window_tokens=40),
    "cosa": dict(stride=4, keep_ratio=0.5),
    "dense": {},
    "dilated": dict(dilation=3),
    "flashprefill": dict(alpha=0.6, sink_tokens=16, window_tokens=32, last_blocks=1),
    "flexprefill": dict(gamma=0.6, tau=0.12),
    "hybrid": dict(
        selectors=[
            dict(name="a_shape", block_size=BLOCK, window_tokens=40),
            dict(
                name="xattention",
                block_size=BLOCK,
                stride=4,
                threshold=[[0.5, 0.7, 0.6, 0.9]],
            ),
        ],
        layers=[[0, 1, 1, 0]],
    ),
    "minference": dict(
        patterns=[
            [
                ["vertical_and_slash", 30, 112],
                ["stream_llm", 20, 30],
                ["vertical_and_slash", 60, 50],
                ["stream_llm", 0, 1],
            ]
        ],
    ),
    "stem": dict(keep_ratio=0.5, budget_mode="density", **_STEM),
    "strided": dict(stride_blocks=3),
    "tri_shape": dict(sink_tokens=20, window_tokens=40, last_tokens=20),
    "vecattention": dict(threshold=0.4, sink_tokens=16, window_tokens=16),
    "xattention": dict(stride=4, threshold=0.8, max_blocks=6),
}

# These look at the last queries there are, so that each chunk is selected by its own.
BY_LAST_QUERIES = "flexprefill", "minference"


def build(case: str) -> Selector:
    size = {} if case == "hybrid" else {"block_size": BLOCK}
    return selector(case, **size, **CASES[case])


def whole(one: Selector, q: Any, k: Any, v: Any) -> tuple[BlockLists, jax.Array]:
    lists = one.select(q, k, v, Place())
    return lists, _all(lists.to_mask(BLOCKS), 2)


def chunk(
    one: Selector, q: Any, k: Any, v: Any, offset: jax.Array, lengths: jax.Array
) -> jax.Array:
    """What queries `[B, STEP, H, D]` of a longer prompt select."""
    lists = one.select(q, k, v, Place(q_offset=offset, lengths=lengths))
    return _all(lists.to_mask(BLOCKS), 2)


def _all(mask: jax.Array, batch: int) -> jax.Array:
    return jnp.broadcast_to(mask, (batch, HEADS, *mask.shape[2:]))


def test_every_selector_is_here() -> None:
    assert set(CASES) == set(selector_names())


@pytest.mark.parametrize("case", CASES)
def test_contract(case: str) -> None:
    one = build(case)
    assert isinstance(one, Selector) and hash(one) == hash(build(case))
    run = jax.jit(lambda *a: whole(one, *a))
    x = structured(TOKENS, HEADS, KV_HEADS, batch=2)
    lists, mask = run(*x)
    mask = np.asarray(mask)

    # Lists: int32, ascending, within their width and the past, with the diagonal.
    indices, counts = np.asarray(lists.indices), np.asarray(lists.counts)
    assert indices.dtype == counts.dtype == np.int32
    assert lists.block_q == lists.block_k == BLOCK
    assert (1 <= counts).all() and (counts <= lists.width).all()
    used = np.arange(lists.width) < counts[..., None]
    assert (np.diff(indices) > 0)[used[..., 1:]].all()
    assert (mask.sum(-1) == counts).all()
    past = np.tril(np.ones((BLOCKS, BLOCKS), bool))
    assert not (mask & ~past).any() and mask[..., range(BLOCKS), range(BLOCKS)].all()

    # It reads what it says it will.
    density = one.density(TOKENS, layer=0, num_layers=1)
    if density is not None:
        assert mask.mean((0, 1)).sum() / past.sum() == pytest.approx(density)

    # A head does not look at the others.
    half = HEADS // 2, KV_HEADS // 2, KV_HEADS // 2
    other = [a.at[:, :, n:].set(a[:, ::-1, :n]) for a, n in zip(x, half, strict=True)]
    assert np.array_equal(run(*other)[1][:, :2], mask[:, :2])

    # Chunks of a longer array, with later keys in place, select what the prompt does;
    # padding has no influence, and its query blocks read their own block only.
    piece = jax.jit(lambda *a: chunk(one, *a))
    short = -(-LENGTHS[1] // BLOCK)
    real = (np.arange(BLOCKS * BLOCK) < np.asarray(LENGTHS)[:, None])[..., None, None]
    pad = ((0, 0), (0, BLOCKS * BLOCK - TOKENS), (0, 0), (0, 0))
    q, k, v = (np.pad(a, pad) for a in x)
    for first in range(0, TOKENS, STEP):
        rows = np.arange(first // BLOCK, (first + STEP) // BLOCK)
        found = []
        for junk in (0, 1e4):
            a, b, c = (np.where(real, a, junk).astype(a.dtype) for a in (q, k, v))
            part = a[:, first : first + STEP]
            offset = np.full(2, first, np.int32)
            found.append(np.asarray(piece(part, b, c, offset, np.asarray(LENGTHS))))
        assert np.array_equal(*found)
        if case not in BY_LAST_QUERIES:
            assert np.array_equal(found[0][0], mask[0][:, rows])
        for row, here in zip(rows, found[0][1].swapaxes(0, 1), strict=True):
            if row >= short:
                assert (here == np.eye(BLOCKS)[row]).all()
            # The last block ends early, and TriShape looks at where a prompt ends.
            elif row < short - 1 and case not in ("tri_shape", *BY_LAST_QUERIES):
                assert np.array_equal(here, mask[1][:, row])
            else:
                assert not here[:, short:].any()


@pytest.mark.parametrize(
    "case",
    [
        "cosa top_p",
        "stem keep_ratio",
        "stem length",
        "a_shape",
    ],
)
def test_everything_can_be_kept(case: str) -> None:
    name, *option = case.split()
    options = {} if name == "a_shape" or option == ["length"] else {option[0]: 1.0}
    one = selector(name, block_size=BLOCK, **options)
    x = structured(TOKENS)
    run = jax.jit(lambda *a: one.select(*a, Place()).to_mask(BLOCKS))
    assert (np.asarray(run(*x)) == np.tril(np.ones((BLOCKS, BLOCKS), bool))).all()


def test_a_shard_of_heads_selects_what_all_heads_do() -> None:
    """Under `shard_map`, with the first head from the mesh and a traced layer."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=auto)
    one = Hybrid(
        selectors=(build("a_shape"), build("xattention")), layers=(0, (1, 0, 1, 1))
    )
    x = structured(TOKENS, HEADS, KV_HEADS)

    def select(layer: jax.Array, *x: jax.Array, first: Any = 0) -> jax.Array:
        place = Place(layer=layer, num_layers=2, first_head=first)
        return one.select(*x, place).to_mask(BLOCKS)

    def local(layer: jax.Array, *x: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("heads") * x[0].shape[2]
        return select(layer, *x, first=first)

    spec = jax.P(None, None, "heads")
    shards = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(jax.P(), spec, spec, spec),
        out_specs=jax.P(None, "heads"),
    )
    both = jax.jit(lambda *a: (shards(*a), select(*a)))
    for layer in range(2):
        assert np.array_equal(*both(layer, *x))
