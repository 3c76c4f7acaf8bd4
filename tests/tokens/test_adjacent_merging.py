"""`atome` and `fastadasp` against loops in numpy."""

import functools

import jax
import numpy as np
import pytest

from angeljax.tokens import atome, fastadasp, keep_count
from tests.tokens import _audio_oracles as oracle
from tests.tokens._sounds import N, clips, compare

NUMBER = 40
X, RECEIVED, ITSELF, MASK = clips(NUMBER, seed=1)
LENGTHS = MASK.sum(1)
METHODS = {"atome": (atome, oracle.atome), "fastadasp": (fastadasp, oracle.fastadasp)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("keep", "weights", "pruner"),
    [
        (0.6, "uniform", None),
        (0.2, "attention", None),  # A-ToMe needs three rounds
        (0.5, "attention", "dpp"),
        (0.5, "uniform", "mmr"),
    ],
)
def test_like_the_loops(name, keep, weights, pruner):
    method, loops = METHODS[name]
    options = {"keep": keep, "weights": weights, "pruner": pruner}
    run = jax.jit(functools.partial(method, **options))
    received = RECEIVED if weights == "attention" else np.ones_like(RECEIVED)
    compared, number = 0, 0
    for threshold in (-1.0, 0.6) if pruner else (0.0,):
        got = run(X, attn=(RECEIVED, ITSELF), mask=MASK, threshold=threshold)
        for b in range(NUMBER):
            n = LENGTHS[b]
            count = keep_count(int(n), keep)
            more = {"pruner": pruner, "threshold": threshold} if pruner else {}
            want = loops(X[b, :n].astype(float), received[b], ITSELF[b], count, **more)
            compared, number = compared + compare(got, b, want), number + 1
            assert int(got.count[b]) == count
    assert compared >= 0.9 * number


def test_needs_attention_only_where_it_says_so():
    for method, _ in METHODS.values():
        plain = method(X, keep=0.5, mask=MASK)
        again = method(X, keep=0.5, mask=MASK, attn=(RECEIVED, ITSELF))
        np.testing.assert_array_equal(plain.merged, again.merged)
        with pytest.raises(ValueError, match="needs attn"):
            method(X, keep=0.5, weights="attention")
        with pytest.raises(ValueError, match="threshold=2"):
            method(X, keep=0.5, pruner="dpp", threshold=2)


def test_gradients_reach_the_members_of_a_mean():
    for method, _ in METHODS.values():
        one = functools.partial(method, keep=1)
        gradient = jax.grad(lambda x, one=one: one(x).merged.sum())(X[0])
        np.testing.assert_allclose(gradient, np.full(X[0].shape, 1 / N), rtol=1e-5)


def test_smallest_clips():
    for method, _ in METHODS.values():
        one = method(X[:, :1], keep=1)
        np.testing.assert_array_equal(one.merged, X[:, :1])
        two = method(X[0, :2], keep=1)
        np.testing.assert_allclose(two.merged[0], X[0, :2].mean(0), rtol=1e-6)
        everything = method(X, keep=N)
        np.testing.assert_array_equal(everything.merged, X)
