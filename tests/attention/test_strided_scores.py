"""XAttention and CoSA against their rules written out with loops."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from angeljax.attention import CoSA, Place, XAttention, _strided
from tests.attention import _oracles
from tests.attention._data import structured

BLOCK, STRIDE = 16, 4
TOKENS = 10 * BLOCK - 5
SHARES = (0.4, 0.7, 0.9, 1.0)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (XAttention, dict(threshold=(SHARES, SHARES[::-1]))),
        (CoSA, dict(top_p=(0.5, SHARES))),
        (CoSA, dict(keep_ratio=0.5)),
    ],
    ids=["xattention", "cosa", "cosa-ratio"],
)
def test_selects_what_the_rule_does(
    cls: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a traced layer; one of them in two parts of chunks and with one left over."""
    x = structured(TOKENS)
    if cls is XAttention:
        monkeypatch.setattr(_strided, "_BYTES", 3 * 4 * 4 * 4 * 40)  # 3 blocks
        monkeypatch.setattr(_strided, "_WORTH", 5)
    one = cls(block_size=BLOCK, stride=STRIDE, **options)

    @jax.jit
    def run(layer: jax.Array, *x: jax.Array) -> jax.Array:
        return one.select(*x, Place(layer=layer, num_layers=2)).to_mask(10)[0]

    q, k = (np.asarray(a[0], np.float64) for a in x[:2])
    rule = _oracles.xattention_mask if cls is XAttention else _oracles.cosa_mask
    for layer in range(2):
        share = next(iter(options.values()))
        entry = share[layer] if isinstance(share, tuple) else share
        shares = list(entry) if isinstance(entry, tuple) else [entry] * 4
        want = rule(q, k, BLOCK, STRIDE, shares, options.get("keep_ratio"))
        found = np.asarray(run(layer, *x))
        assert np.array_equal(found, want)
        for head in np.flatnonzero(np.asarray(shares) == 1.0):
            assert (found[head] == np.tril(np.ones((10, 10), bool))).all()


def test_at_most_so_many_blocks() -> None:
    """The best of those that the threshold names."""
    x = structured(TOKENS)
    one = XAttention(block_size=BLOCK, stride=STRIDE, max_blocks=4)
    few = np.asarray(jax.jit(lambda *a: one.select(*a, Place()).to_mask(10)[0])(*x))
    q, k = (np.asarray(a[0], np.float64) for a in x[:2])
    named = _oracles.xattention_mask(q, k, BLOCK, STRIDE, [0.9] * 4)
    assert not (few & ~named).any()
    assert np.array_equal(few.sum(-1), np.minimum(named.sum(-1), 4))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (XAttention, dict(threshold=0.0), "threshold must be a number above 0"),
        (XAttention, dict(threshold=((0.5, 2.0),)), "threshold must be a number"),
        (CoSA, dict(stride=3), "stride=3 must divide block_size=128"),
        (CoSA, dict(max_blocks=1), "max_blocks must be an integer from 2 on, not 1"),
        (CoSA, dict(keep_ratio=(0.5,)), "keep_ratio must be a number above 0"),
    ],
)
def test_options_are_checked(cls: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_thresholds_must_fit_the_model() -> None:
    x = structured(TOKENS)
    one = XAttention(block_size=BLOCK, threshold=((0.5, 0.9),))
    with pytest.raises(ValueError, match="threshold has 2 heads and q has 4"):
        one.select(*x, Place())
    with pytest.raises(ValueError, match="threshold has 1 entries and the model 2"):
        one.select(*x, Place(num_layers=2))
