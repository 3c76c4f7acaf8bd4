"""Stem against AngelSlim's steps written out, in chunks, by layer, and when padded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import Place, Stem, _frame
from angeljax.attention._frame import make_frame
from pallas_kernels import block_sparse_attention
from tests.attention import _oracles
from tests.attention._data import structured

BLOCK, STRIDE = 16, 4
SMALL: dict[str, Any] = dict(
    block_size=BLOCK, stride=STRIDE, sink_blocks=1, window_blocks=2, dense_layers=0
)
TOKENS = 11 * BLOCK + 6  # a short last block, and a cell of two rows


def oracle(stem: Stem, x: Any, budgets: list[int] | None = None) -> np.ndarray:
    """Mask by the literal steps; with causal statistics one prompt for each row."""
    q, k, v = (np.asarray(a, np.float64) for a in x)
    if stem.select_per == "kv_head":
        q = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).mean(2)
    budgets = stem.budgets(len(q)).tolist() if budgets is None else budgets
    how = stem.value_weight, stem.valid_mean, stem.value_form
    sums = _oracles.strided(q, k, BLOCK, STRIDE)
    logits = _oracles.stem_logits(q, v, sums, BLOCK, STRIDE, *how)
    if stem.value_stats == "causal":
        for i in range(1, len(logits[0]) - 1):
            size, cells = (i + 1) * BLOCK, (i + 1) * BLOCK // STRIDE
            cut = q[:size], v[:size], sums[:, :cells, :cells]
            one = _oracles.stem_logits(*cut, BLOCK, STRIDE, *how)
            logits[:, i, : i + 1] = one[:, i]
    assert _oracles.gap(logits, budgets) > 1e-3
    return _oracles.stem_mask(logits, budgets, stem.sink_blocks, stem.window_blocks)


def first(x: Any) -> list[Any]:
    """The only row of the batch."""
    return [a[0] for a in x]


@pytest.mark.parametrize(
    "options",
    [
        dict(value_stats="prompt", valid_mean=False),  # AngelSlim's
        dict(select_per="kv_head"),
        dict(value_form="paper", alpha=1.0),
    ],
    ids=lambda options: next(iter(options)),
)
def test_selects_what_the_strided_steps_select(options: dict[str, Any]) -> None:
    stem = Stem(**SMALL, keep_ratio=0.35, **options)
    x = structured(TOKENS)
    found = jax.jit(lambda *a: stem.select(*a, Place()).to_mask(12))(*x)
    assert np.array_equal(found[0], oracle(stem, first(x)))


def test_cells_are_ranked_by_their_softmax_mass() -> None:
    """Mean scores of cells of two groups, softmax by row, sums over blocks."""
    stem = Stem(**SMALL, cells=2, keep_ratio=0.4, budget_mode="rows", value_weight=0.0)
    tokens = 12 * BLOCK
    x = structured(tokens)
    q, k, _ = (np.asarray(a, np.float64) for a in first(x))
    sums = _oracles.strided(q, k, BLOCK, STRIDE)  # [H, groups, groups], causal or not
    heads, groups, _ = sums.shape
    cells = groups // 2
    scores = sums.reshape(heads, cells, 2, cells, 2).mean((2, 4))
    scores = scores / (STRIDE * np.sqrt(q.shape[-1]))
    mass = np.zeros((heads, 12, 12))
    for h in range(heads):
        for a in range(cells):
            e = np.exp(scores[h, a, : a + 1] - scores[h, a, : a + 1].max())
            for c in range(a + 1):
                mass[h, a // 2, c // 2] += e[c] / e.sum()
    want = np.zeros(mass.shape, bool)
    for h in range(heads):
        for i in range(12):
            forced = {0, i, max(i - 1, 0)}
            budget = max(int(0.4 * (i + 1) + 0.5), len(forced))
            ranked = [j for j in np.argsort(-mass[h, i, : i + 1]) if j not in forced]
            want[h, i, [*forced, *ranked[: budget - len(forced)]]] = True
    found = jax.jit(lambda *a: stem.select(*a, Place()).to_mask(12))(*x)
    assert np.array_equal(found[0], want)
    assert stem.density(tokens) == want[0].sum() / (12 * 13 / 2)


@pytest.mark.parametrize(
    ("weight", "dtype", "limit"),
    [(0.2, "float32", 1e-5), (0.0, "float32", 1e-5), (0.2, "bfloat16", 2e-3)],
)
def test_scores_are_the_strided_ones(weight: float, dtype: str, limit: float) -> None:
    stem = Stem(**SMALL, value_stats="prompt", value_weight=weight, valid_mean=False)
    heads = (4, 2) if weight else (3, 1)
    x = [a.astype(dtype) for a in structured(TOKENS, *heads)]
    q, k, v = (np.asarray(a, np.float64) for a in first(x))
    sums = _oracles.strided(q, k, BLOCK, STRIDE)
    want = _oracles.stem_logits(q, v, sums, BLOCK, STRIDE, weight)

    @jax.jit
    def run(*x: jax.Array) -> jax.Array:
        frame = make_frame(*x, Place(), BLOCK)
        ((rows, scores),) = stem._scores(frame, *x)
        assert rows == slice(0, 12)
        return scores

    found = np.asarray(run(*x))[0].reshape(want.shape)
    causal = np.isfinite(want)
    error = np.abs(found - want)[causal].max()
    assert error <= limit * np.ptp(want[causal])


def test_parts_and_chunks_select_what_the_prompt_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced offsets with keys of later chunks in place, and a known one in parts."""
    stem = Stem(**SMALL, keep_ratio=0.35)
    q, k, v = structured(12 * BLOCK)
    step = 4 * BLOCK
    want = oracle(stem, first((q, k, v)))
    monkeypatch.setattr(_frame, "_PART", 4)

    @jax.jit
    def run(q: jax.Array, offset: jax.Array) -> Any:
        place = Place(q_offset=offset, total=12 * BLOCK)
        return stem.select(q, k, v, place).to_mask(12)

    @jax.jit
    def known(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        place = Place(q_offset=step, total=12 * BLOCK)
        return stem.select(q[:, step:], k, v, place).to_mask(10)

    for offset in range(0, 12 * BLOCK, step):
        rows = slice(offset // BLOCK, (offset + step) // BLOCK)
        found = run(q[:, offset : offset + step], offset)
        assert np.array_equal(found[0], want[:, rows])
    found = known(*(a[:, : 10 * BLOCK] for a in (q, k, v)))
    assert np.array_equal(found[0], want[:, 4:10, :10])


def test_traced_layers() -> None:
    """Budgets by layer from a table; lists as wide as the possible layers need."""
    some = {**SMALL, "dense_layers": 1, "value_stats": "prompt"}
    stem = Stem(**some, keep_ratio=(0.9, 0.5, 0.25))
    x = structured(12 * BLOCK)

    def select(layer: Any, among: Any = None) -> Any:
        return stem.select(*x, Place(layer=layer, num_layers=3, among=among))

    run = jax.jit(lambda layer: select(layer).to_mask(12)[0])
    for layer in range(3):
        budgets = stem.budgets(12 * BLOCK, layer=layer, num_layers=3).tolist()
        assert np.array_equal(run(layer), oracle(stem, first(x), budgets))
    widths = [
        jax.eval_shape(lambda i, among=among: select(i, among), jnp.int32(0)).width
        for among in (None, (1, 2), (2,))
    ]
    assert widths == [12, 8, 5]


def test_mapped_prompts_of_unequal_lengths() -> None:
    stem = Stem(**SMALL, keep_ratio=0.35)
    lengths = 12 * BLOCK, 4 * BLOCK + 6
    x = structured(12 * BLOCK, batch=2)

    @jax.jit
    @jax.vmap
    def run(q: jax.Array, k: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
        place = Place(lengths=n[None])
        return stem.select(q[None], k[None], v[None], place).to_mask(12)[0]

    found = np.asarray(run(*x, jnp.asarray(lengths)))
    budgets = stem.budgets(12 * BLOCK).tolist()
    for row, length in enumerate(lengths):
        blocks = -(-length // BLOCK)
        want = oracle(stem, [a[row, :length] for a in x], budgets)
        assert np.array_equal(found[row, :, :blocks, :blocks], want)


def test_everything_kept_is_dense_attention() -> None:
    q, k, v = structured(TOKENS)
    stem = Stem(**SMALL, keep_ratio=1.0)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        lists = stem.select(q, k, v, Place())
        y = block_sparse_attention(q, k, v, lists, implementation="reference")
        return jnp.abs(y - jax.nn.dot_product_attention(q, k, v, is_causal=True)).max()

    assert float(run(q, k, v)) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stride=24), "stride=24 must divide block_size=128"),
        (dict(alpha=0.0), "alpha must be a number above 0 and at most 1"),
        (dict(cells=3), "cells=3 must be an integer that divides the 16 groups of 8"),
        (dict(keep_ratio=(0.5, 2)), "keep_ratio must be a number above 0 and at most"),
        (dict(budget_mode="density"), "budget_mode='density' needs a keep_ratio"),
        (dict(budget_mode="fixed"), "budget_mode must be one of 'ratio', 'density'"),
        (dict(window_blocks=0), "window_blocks must be an integer from 1 on, not 0"),
        (dict(value_weight=-1), "value_weight must be 0 or more, not -1"),
        (dict(length_rates=(1,)), "length_rates must be two numbers"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Stem(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place(q_offset=8), "q_offset=8 must be a multiple of the block size 16"),
        (Place(q_offset=64), "q_offset=64: 64 queries in 64 keys start at 0 to 0"),
        (Place(total=32), "total=32 is less than the 64 tokens up to the last query"),
        (Place(layer=3, num_layers=2), "layer 3 of a model with num_layers=2"),
    ],
)
def test_places_are_checked(place: Place, message: str) -> None:
    x = structured(64)
    with pytest.raises(ValueError, match=message):
        Stem(**SMALL).select(*x, place)
