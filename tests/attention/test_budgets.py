"""Budgets of Stem against AngelSlim's schedule written out, and set densities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from angeljax.attention import Stem
from tests.attention import _oracles

SIZES = (1, 8, 55, 56, 64, 128, 159, 160, 256, 1024)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 1.0])
def test_angelslim_schedule(alpha: float) -> None:
    for n in SIZES:
        for ratio in (0.2, 0.5, 1.0):
            stem = Stem(
                budget_mode="angelslim", keep_ratio=ratio, alpha=alpha, dense_layers=0
            )
            want = _oracles.schedule(n, alpha, ratio)
            assert stem.budgets(n * 128 - 5).tolist() == want
            # Without a ratio the length rule is the default, too.
            if int(ratio * n) != n:
                plain = Stem(alpha=alpha, dense_layers=0)
                assert plain.budgets(n * 128).tolist() == want


def test_published_densities() -> None:
    """The share that is read with the shipped settings: prompts of 8k to 256k."""
    for alpha, rows in {
        1.0: {64: (0.878, 0.950), 256: (0.383, 0.431), 1024: (0.241, 0.255)},
        0.7: {64: (0.808, 0.884), 128: (0.596, 0.664), 2048: (0.185, 0.192)},
    }.items():
        for n, (low, high) in rows.items():
            stem = Stem(alpha=alpha, dense_layers=0)
            found = stem.density_bounds(n * 128)
            assert found == pytest.approx((low, high), abs=2e-3)
    assert Stem().density(55 * 128, layer=2, num_layers=4) == 1.0
    assert Stem().density(128 * 128, layer=1, num_layers=4) == 1.0
    assert Stem().density(128 * 128, layer=2, num_layers=4) is None


def test_ratios_and_decay_differ_between_layers() -> None:
    stem = Stem(keep_ratio=(1.0, 0.25, 0.5), alpha=(0.7, 1.0, 0.5), dense_layers=1)
    at = [stem.budgets(128 * 100, layer=i, num_layers=3) for i in range(3)]
    assert at[0].tolist() == [100] * 100
    assert at[1].tolist() == [25] * 100
    assert at[2].tolist() == _oracles.decay(100, 50, 0.5)
    floor = Stem(keep_ratio=0.1, min_blocks=46, dense_layers=0)
    assert floor.budgets(128 * 100)[0] == 46
    with pytest.raises(ValueError, match="alpha has 3 entries and the model 4 layers"):
        stem.budgets(128, layer=0, num_layers=4)


@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_set_density_is_met_to_a_block(alpha: float) -> None:
    for n in (33, 128, 1024):
        causal = n * (n + 1) // 2
        for ratio in (0.25, 0.5, 0.9):
            stem = Stem(
                budget_mode="density",
                keep_ratio=ratio,
                alpha=alpha,
                dense_layers=0,
                sink_blocks=1,
                window_blocks=2,
            )
            budgets = stem.budgets(n * 128)
            assert budgets.sum() == math.floor(ratio * causal + 0.5)
            assert stem.density(n * 128) == budgets.sum() / causal
            # It decays wherever a row sees more than it may read.
            held = budgets[budgets < np.arange(1, n + 1)]
            assert (np.diff(held) <= 0).all()
            assert held[-1] >= math.floor(alpha * held[0]) - 1
