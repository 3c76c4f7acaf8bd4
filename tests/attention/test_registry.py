"""The table of selectors, static patterns against their definition, and mixtures."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from angeljax.attention import (
    AShape,
    Dense,
    Dilated,
    Hybrid,
    Place,
    Stem,
    Strided,
    TriShape,
    selector,
)
from tests.attention._data import structured

BLOCK, BLOCKS = 16, 9
TOKENS = BLOCKS * BLOCK - 7


def _pairs(rule: Any) -> np.ndarray:
    """Blocks that hold a pair that the rule keeps, and the diagonal."""
    mask = np.eye(BLOCKS, dtype=bool)
    for t in range(TOKENS):
        for s in range(t + 1):
            if rule(t, s):
                mask[t // BLOCK, s // BLOCK] = True
    return mask


def _blocks(rule: Any) -> np.ndarray:
    mask = np.eye(BLOCKS, dtype=bool)
    for i in range(BLOCKS):
        for j in range(i):
            mask[i, j] |= rule(i, j)
    return mask


STATIC = {
    "a_shape": (
        AShape(block_size=BLOCK, sink_tokens=17, window_tokens=34),
        lambda: _pairs(lambda t, s: s < 17 or s > t - 34),
    ),
    "tri_shape": (
        TriShape(block_size=BLOCK, sink_tokens=1, window_tokens=17, last_tokens=10),
        lambda: _pairs(lambda t, s: s < 1 or s > t - 17 or t >= TOKENS - 10),
    ),
    "dilated": (
        Dilated(block_size=BLOCK, dilation=3, window_blocks=7),
        lambda: _blocks(lambda i, j: (i - j) % 3 == 0 and i - j < 7),
    ),
    "strided": (
        Strided(block_size=BLOCK, stride_blocks=4, summary_blocks=2),
        lambda: _blocks(lambda i, j: i - j < 4 or j % 4 >= 2),
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_patterns(name: str) -> None:
    one, rule = STATIC[name]
    x = structured(TOKENS)
    # Without `jit` once: nothing is decided by whether arrays are traced.
    plain = name == "tri_shape"
    run = one.select if plain else jax.jit(one.select, static_argnums=3)
    lists = run(*x, Place())
    want = rule()
    assert np.array_equal(lists.to_mask(BLOCKS)[0, 0], want)
    assert lists.width == want.sum(-1).max()
    assert one.density(TOKENS) == want.sum() / (BLOCKS * (BLOCKS + 1) / 2)


def test_scanned_layers_run_their_own_selector() -> None:
    near = AShape(block_size=BLOCK, sink_tokens=0, window_tokens=1)
    stem = Stem(block_size=BLOCK, stride=4, keep_ratio=0.2, select_per="kv_head")
    one = Hybrid(
        selectors=(Dense(block_size=BLOCK), near, stem),
        layers=(0, 1, (1, 0, 0, 0), 1, 2),
    )
    x = structured(TOKENS)

    @jax.jit
    def run(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = Place(layer=layer, num_layers=5, among=(0, 1, 2, 3))
        mask = one.select(*x, place).to_mask(BLOCKS)
        place = Place(layer=layer, num_layers=5)
        return mask, jax.eval_shape(lambda: one.select(*x, place)).width

    dense, own = np.tril(np.ones((BLOCKS, BLOCKS), bool)), np.eye(BLOCKS, dtype=bool)
    for layer, heads in enumerate(([0] * 4, [1] * 4, [1, 0, 0, 0], [1] * 4)):
        mask, width = run(layer)
        assert width == BLOCKS
        assert np.array_equal(mask[0], [own if h else dense for h in heads])
        share = np.mean([own.sum() / dense.sum() if h else 1 for h in heads])
        assert one.density(TOKENS, layer=layer, num_layers=5) == pytest.approx(share)
    assert one.density(TOKENS, layer=4, num_layers=5) is None


def test_selectors_by_name() -> None:
    one = selector(
        "hybrid",
        selectors=[{"name": "dense"}, {"name": "stem", "alpha": [0.7, 1.0]}],
        layers=[0, [0, 1]],
    )
    stem = Stem(alpha=(0.7, 1.0))
    assert one == Hybrid(selectors=(Dense(), stem), layers=(0, (0, 1)))
    for name, options, message in (
        ("stemm", {}, "unknown selector 'stemm': did you mean stem"),
        ("stem", {"keep_ration": 1}, "no option 'keep_ration': did you mean keep_rat"),
        ("hybrid", {"layers": [0]}, "hybrid needs selectors"),
        ("hybrid", {"selectors": [{}], "layers": [0]}, "needs a name"),
        ("hybrid", {"selectors": [{"name": "dense"}], "layers": [1]}, "layers has 1"),
        ("hybrid", {"selectors": [], "layers": [1]}, "selectors must be a tuple with"),
        ("hybrid", {"selectors": [3], "layers": [1]}, "selectors holds 3"),
        ("a_shape", {"window_tokens": 0}, "window_tokens must be an integer from 1"),
        ("strided", {"summary_blocks": 17}, "summary_blocks=17 must be at most"),
        ("dense", {"block_size": 1.5}, "block_size must be an integer from 1 on"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            selector(name, **options)
        assert "\n" not in str(error.value)
